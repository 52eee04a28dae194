"""`Decoder.run_rows`: rows of a pass have their own caches and numbers of positions."""

import pytest
import torch
from tiny_decoders import random_prompt, tiny_decoder

import tiny_models
from layerskip.model import load

COUNTS = (1, 7, 160, 3)


def caches_after(decoder, lengths):
    """Return a cache with a random text of each length, and its tokens."""
    caches = []
    for i, length in enumerate(lengths):
        cache = decoder.new_cache(length + 200)
        tokens = torch.tensor([random_prompt(decoder, length, seed=i)])
        decoder.run(decoder.embed(tokens), 0, len(decoder.layers), cache)
        cache.lengths += length
        caches.append(cache)
    return caches


def alone_and_together(decoder, start=0):
    """Return the hidden states of some rows, each run alone and all in one pass."""
    lengths, n_layers = (5, 300, 2, 130), len(decoder.layers)
    hidden = [decoder.embed(torch.tensor([random_prompt(decoder, n, seed=n)])) for n in COUNTS]
    alone = [
        decoder.run(part, start, n_layers, cache)[0]
        for part, cache in zip(hidden, caches_after(decoder, lengths), strict=True)
    ]
    rows = list(zip(caches_after(decoder, lengths), COUNTS, strict=True))
    together = decoder.run_rows(torch.cat(hidden, dim=1)[0], start, n_layers, rows)
    return alone, together.split(COUNTS)


@pytest.mark.parametrize("case", ["llama3.1", "mistral", "qwen3", "gemma2", "phi3"])
def test_each_row_is_that_of_its_own_pass(case):
    decoder = tiny_decoder(case, max_position_embeddings=1024)
    with torch.inference_mode():
        for one, row in zip(*alone_and_together(decoder), strict=True):
            torch.testing.assert_close(row, one, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama3.1", "mistral"])
def test_to_the_bit_in_compiled_kernels(tmp_path, case, dtype):
    tiny_models.build(case, max_position_embeddings=1024).save_pretrained(tmp_path)
    decoder = load(tmp_path, dtype=dtype, compiled=True).decoder
    with torch.inference_mode():
        for start in (0, 1):
            for one, row in zip(*alone_and_together(decoder, start), strict=True):
                assert torch.equal(row, one)


def test_a_row_without_room_is_refused():
    decoder = tiny_decoder("llama3.1")
    rows = [(decoder.new_cache(8), 1), (decoder.new_cache(2), 3)]
    with pytest.raises(ValueError, match="the KV cache holds 2 positions, 3 are needed"):
        decoder.run_rows(decoder.embed(torch.tensor([[1, 2, 3, 4]]))[0], 0, 1, rows)
