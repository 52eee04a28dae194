"""GGUF files of families beyond Llama: transformers' logits, and llama.cpp's where it is installed."""

import importlib.util

import gguf_families
import pytest
import torch
from llama_server import Llama

from layerskip.model import load
from tiny_models import reference_logits

VOCABULARY = 270  # a byte-level tokenizer needs 256
N_TOKENS = 40  # more than every sliding window


def logits(path, tokens):
    """Our decoder's float32 logits [1, T, V]."""
    decoder = load(path, dtype=torch.float32).decoder
    cache = decoder.new_cache(tokens.shape[1])
    states = decoder.run(decoder.embed(tokens), 0, len(decoder.layers), cache)
    return decoder.logits(states)


@pytest.mark.parametrize("name", gguf_families.CASES)
def test_logits_are_those_of_transformers_and_llama_cpp(name, tmp_path):
    model, path = gguf_families.build(name, vocab_size=VOCABULARY), tmp_path / "m.gguf"
    gguf_families.write(path, name, model)
    tokens = torch.randint(VOCABULARY, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
    found = logits(path, tokens)
    torch.testing.assert_close(found, reference_logits(model, tokens), rtol=0.0, atol=1e-4)
    if gguf_families.CASES[name].exact and importlib.util.find_spec("xllamacpp"):
        theirs = Llama(path, n_ctx=64, exact=True).log_probs(tokens[0].tolist(), VOCABULARY, last=6)
        # llama.cpp's GELU is a table in float16.
        atol = 1e-2 if name.startswith("gemma") else 1e-4
        torch.testing.assert_close(theirs, found[0, -6:].log_softmax(-1), rtol=0.0, atol=atol)
