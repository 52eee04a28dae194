"""Decoding on a CUDA GPU: exactness, sampled distribution, cache rollback, torch.compile."""

from collections import Counter

import pytest
import torch

import tiny_models
from layerskip import LayerSkipModel

DEVICE = "cuda"
PROMPT = [5, 6, 7, 8, 5, 6]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def folder(case):
        path = tmp_path_factory.getbasetemp() / f"gpu-{case}"
        if not path.exists():
            tiny_models.reference(case).save_pretrained(path)
        return path

    return folder


def load(folder, **options):
    options = {"dtype": "float32", "device": DEVICE, "compile": False} | options
    return LayerSkipModel.from_pretrained(folder, **options)


@pytest.mark.parametrize("case", ["llama3.2", "qwen3", "gemma3", "mixtral", "gpt-neox"])
@pytest.mark.parametrize(("exit_layer", "draft_tokens"), [(1, 1), (2, 4), (3, 7)])
def test_greedy_self_speculative_equals_plain(folders, case, exit_layer, draft_tokens):
    model = load(folders(case))
    options = {"max_new_tokens": 48, "ignore_eos": True}
    plain = model.generate(PROMPT, mode="plain", **options)
    speculative = model.generate(
        PROMPT,
        mode="self-speculative",
        exit_layer=exit_layer,
        draft_tokens=draft_tokens,
        **options,
    )
    assert speculative.token_ids == plain.token_ids
    assert speculative.drafted > 0


@pytest.mark.parametrize("case", tiny_models.ONE_OF_EACH)
def test_logits_equal_those_of_transformers(folders, case):
    tokens = tiny_models.token_ids(case, 1, 12)
    expected = tiny_models.reference_logits(tiny_models.reference(case), tokens)
    logits = tiny_models.logits_of(load(folders(case)).decoder, tokens.to(DEVICE))
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_sampled_tokens_have_the_distribution_of_plain_decoding(folders):
    model = load(folders("llama3.2"))
    options = {"max_new_tokens": 3, "temperature": 1.0, "top_k": 3, "ignore_eos": True}
    modes = {
        "plain": {"mode": "plain"},
        "self-speculative": {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 2},
    }
    n = 600
    counts = {
        mode: Counter(
            tuple(model.generate(PROMPT, seed=seed, **how, **options).token_ids)
            for seed in range(n)
        )
        for mode, how in modes.items()
    }
    plain, speculative = counts.values()
    outcomes = plain.keys() | speculative.keys()
    # Chi-square statistic of homogeneity; its mean is len(outcomes) - 1, its variance twice that.
    statistic = sum(
        (plain[o] - speculative[o]) ** 2 / (plain[o] + speculative[o]) for o in outcomes
    )
    freedom = len(outcomes) - 1
    assert freedom > 3
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_rejected_positions_leave_no_trace_in_the_cache(folders):
    decoder = load(folders("llama3.2")).decoder
    num_layers = len(decoder.layers)

    def logits(cache, position, tokens):
        cache.lengths.fill_(position)
        ids = torch.tensor([tokens], device=DEVICE)
        return decoder.logits(decoder.run(decoder.embed(ids), 0, num_layers, cache))

    with torch.inference_mode():
        cache = decoder.new_cache(32)
        logits(cache, 0, PROMPT)
        logits(cache, len(PROMPT), [9, 10, 11, 12])
        after_rollback = logits(cache, len(PROMPT), [20, 21])
        fresh = decoder.new_cache(32)
        logits(fresh, 0, PROMPT)
        torch.testing.assert_close(after_rollback, logits(fresh, len(PROMPT), [20, 21]))


def test_compiled_decoding_equals_eager_decoding(folders):
    options = {"max_new_tokens": 40, "ignore_eos": True}
    expected = load(folders("llama3.2")).generate(PROMPT, mode="plain", **options).token_ids
    compiled = load(folders("llama3.2"), compile=True)
    assert compiled.decoder.kernels == "torch.compile"
    speculative = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 3}
    assert compiled.generate(PROMPT, mode="plain", **options).token_ids == expected
    for _ in range(2):  # the second call replays captured graphs
        assert compiled.generate(PROMPT, **speculative, **options).token_ids == expected


def test_bfloat16_auto_decoding_runs(folders):
    model = load(folders("llama3.2"), dtype="bfloat16")
    assert model.generate(PROMPT, max_new_tokens=16, ignore_eos=True).new_tokens == 16
