"""Random weights in a model's shape, and rounds whose acceptance is scripted."""

import pytest
import shapes
import torch
from transformers import LlamaConfig

from layerskip.decoding import Plan, Sampling, generate

TINY = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", ["16bit", "int4"])
def test_all_figures_of_a_shape(weights, tied, compiled_kernels, monkeypatch):
    monkeypatch.setattr(shapes, "read_bandwidth", lambda device: 1e9)
    config = LlamaConfig(**{**TINY.to_dict(), "tie_word_embeddings": tied})
    decoder = shapes.random_decoder(config, weights, torch.device("cpu"))
    assert decoder.weights == weights
    found = shapes.measure(decoder, 1, 3, 12, 1)
    assert found["layers"] == 4
    assert found["kernels"] == "compiled"
    assert found["ceiling_tokens_per_s"] == 1e9 / decoder.weight_bytes
    assert set(found["pass_ms"]) == {str(n) for n in shapes.POSITIONS}
    for row in found["self_speculative"]:
        assert row["speedup"] == pytest.approx(row["tokens_per_s"] / found["plain_tokens_per_s"])


@pytest.mark.parametrize(("chance", "tokens_a_round"), [(0.0, 1.0), (0.5, 1.875), (1.0, 4.0)])
def test_the_script_decides_how_many_tokens_stand(chance, tokens_a_round, compiled_kernels):
    decoder = shapes.random_decoder(TINY, "16bit", torch.device("cpu"))
    plan = Plan(mode="self-speculative", exit_layer=1, draft_tokens=3)
    how = {"plan": plan, "sampling": Sampling(), "max_new_tokens": 400}
    with shapes.scripted(chance):
        steps = list(generate(decoder, [1, 2, 3], **how))
    whole = steps[1:-2]  # without the prompt's own, and those that the end cuts short
    found = sum(len(step.tokens) for step in whole) / len(whole)
    assert found == pytest.approx(tokens_a_round, abs=0.25)
