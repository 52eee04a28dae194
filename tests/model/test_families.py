"""Every family against transformers on tiny random weights, float32."""

import pytest
import torch

from layerskip.model.native import NativeDecoder
from tiny_models import (
    CASES,
    LAYERS,
    checkpoint,
    reference,
    reference_logits,
    token_ids,
)

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}  # float32
TOKENS = 75  # more than twice the original context of the llama3 rotary scaling


# Supported by the compiled kernels, at these widths.
COMPILED = [
    "llama2",
    "llama3.2",
    "llama-biases",
    "llama-mqa",
    "mistral",
    "qwen2-sliding",
    "qwen3-mha",
    "qwen3-sliding",
    "gemma2-uncapped",
    "phi3",
    "smollm3-sliding",
    "granite",
    "phi4-mini",
]
# Of what the kernels do not support, one case each: widths, soft caps, layer norms, experts.
UNSUPPORTED = ["llama-narrow-heads", "smollm2", "gemma2", "gemma3", "olmo2", "mixtral", "gpt-neox"]


def variants(pytorch, compiled):
    """Parametrize with cases that run in PyTorch, and cases that run in the compiled kernels."""
    return pytest.mark.parametrize(
        "variant",
        [*((case, False) for case in pytorch), *((case, True) for case in compiled)],
        ids=lambda variant: variant[0] + "-compiled" * variant[1],
        scope="module",
    )


# A cache of each kind: windows, experts, a parallel residual, layers without positions.
kinds = variants(
    ["llama2", "gemma3", "mixtral", "gpt-neox", "smollm3"], ["llama3.1", "qwen3-sliding", "granite"]
)


@pytest.fixture(scope="module")
def case(variant):
    return variant[0]


@pytest.fixture(scope="module")
def decoder(request, variant, tmp_path_factory):
    case, compiled = variant
    if compiled:
        request.getfixturevalue("compiled_kernels")
    decoder = checkpoint(case, tmp_path_factory.mktemp(case), compiled=compiled).decoder
    assert isinstance(decoder, NativeDecoder) == compiled
    return decoder


def test_unsupported_by_the_kernels_means_pytorch(tmp_path):
    for case in UNSUPPORTED:
        decoder = checkpoint(case, tmp_path / case, compiled=True).decoder
        assert not isinstance(decoder, NativeDecoder), case


def run_in_chunks(decoder, tokens, sizes):
    """Logits [B, T, V] of cached passes over so many tokens each."""
    cache = decoder.new_cache(tokens.shape[1], batch_size=tokens.shape[0])
    logits = []
    for chunk in tokens.split(sizes, dim=1):
        hidden = decoder.run(decoder.embed(chunk), 0, LAYERS, cache)
        cache.lengths += chunk.shape[1]
        logits.append(decoder.logits(hidden))
    return torch.cat(logits, dim=1)


@variants(CASES, COMPILED)
def test_logits_equal_those_of_transformers(case, decoder):
    tokens = token_ids(case, 2, TOKENS)
    expected = reference_logits(reference(case), tokens)
    assert expected.std() > 0.5  # numbers large enough for the tolerance to mean something
    for sizes in ([TOKENS], [1] * TOKENS, [40, 1, 9, 2, 5, 1, 1, 8, 8]):
        torch.testing.assert_close(run_in_chunks(decoder, tokens, sizes), expected, **TOLERANCE)


@kinds
def test_split_run_equals_whole_run_bit_for_bit(case, decoder):
    n, tokens = 6, token_ids(case, 1, 26)
    outcomes = []
    for stops in ([LAYERS], [0, 1, LAYERS - 1, LAYERS]):
        cache = decoder.new_cache(20 + n)
        decoder.run(decoder.embed(tokens[:, :20]), 0, LAYERS, cache)
        cache.lengths += 20
        hidden, start = decoder.embed(tokens[:, 20:]), 0
        for stop in stops:
            hidden, start = decoder.run(hidden, start, stop, cache), stop
        outcomes.append((hidden, cache.slots))
    for whole, split in zip(*outcomes, strict=True):
        assert torch.equal(whole, split)


@kinds
def test_ragged_rows_equal_their_own_runs_alone(case, decoder):
    lengths, steps = (3, 17, 11), (1, 5, 1)
    tokens = token_ids(case, len(lengths), max(lengths) + sum(steps))
    cache = decoder.new_cache(tokens.shape[1], batch_size=len(lengths))
    # Prompts padded on the right: setting the lengths forgets the padding.
    decoder.run(decoder.embed(tokens[:, : max(lengths)]), 0, LAYERS, cache)
    cache.lengths.copy_(torch.tensor(lengths))
    logits = [[] for _ in lengths]
    for n in steps:
        at = cache.lengths[:, None] + torch.arange(n)
        hidden = decoder.run(decoder.embed(tokens.gather(1, at)), 0, LAYERS, cache)
        cache.lengths += n
        for row, own in enumerate(decoder.logits(hidden)):
            logits[row].append(own)
    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1, : length + sum(steps)]
        expected = reference_logits(reference(case), alone)[0, length:]
        torch.testing.assert_close(torch.cat(logits[row]), expected, **TOLERANCE)


@kinds
def test_rows_forget_what_lies_beyond_their_length(case, decoder):
    tokens = token_ids(case, 1, 20)
    cache = decoder.new_cache(20)
    decoder.run(decoder.embed(token_ids(case, 1, 20, seed=1)), 0, LAYERS, cache)
    cache.lengths += 20
    cache.lengths.zero_()
    hidden = decoder.run(decoder.embed(tokens), 0, LAYERS, cache)
    fresh = decoder.run(decoder.embed(tokens), 0, LAYERS, decoder.new_cache(20))
    assert torch.equal(hidden, fresh)
