"""GGUF files of every kind against transformers on the weights that they stand for, float32."""

import dataclasses
import itertools

import gguf_files
import pytest
import torch
from gguf import GGMLQuantizationType

from layerskip.model import load
from layerskip.model.families import FAMILIES
from layerskip.model.linear import DenseLinear
from layerskip.model.weights import GgufFile
from tiny_models import build, logits_of, reference, reference_logits, token_ids

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}  # float32
CASES = {  # case, and the architecture that names it in the file
    "llama2": "llama",
    "smollm2": "llama",
    "llama-linear": "llama",
    "llama-biases": "llama",
    "mistral-unlimited": "llama",
    "qwen2": "qwen2",
    "qwen2-tied": "qwen2",
    "qwen3": "qwen3",
}


def fitting(case):
    """A case with rows that are whole blocks of 32, which the quantized kinds need."""
    return build(case, hidden_size=96 if case == "smollm2" else 64, head_dim=32)


kinds = pytest.mark.parametrize("kind", gguf_files.KINDS, ids=lambda kind: kind.name)
# Every case with one type, and every type with one case.
PAIRS = [
    *((case, gguf_files.KINDS[i % len(gguf_files.KINDS)]) for i, case in enumerate(CASES)),
    *(("llama2", kind) for kind in gguf_files.KINDS[1:]),
]


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_logits_equal_those_of_the_dequantized_weights(case, kind, tmp_path):
    model, path = fitting(case), tmp_path / "model.gguf"
    model.load_state_dict(gguf_files.write(path, model, kind=kind, architecture=CASES[case]))
    decoder = load(path, dtype=torch.float32).decoder
    tokens = token_ids(case, 2, 40)
    torch.testing.assert_close(
        logits_of(decoder, tokens), reference_logits(model, tokens), **TOLERANCE
    )


@kinds
def test_loaded_weights_are_the_dequantized_ones(kind, tmp_path):
    model, path = fitting("llama2"), tmp_path / "model.gguf"
    state = gguf_files.write(path, model, kind=kind)
    decoder = load(path, dtype=torch.float32).decoder
    assert torch.equal(decoder.embedding.weight, state["model.embed_tokens.weight"])
    assert torch.equal(decoder.head.weight, state["lm_head.weight"])
    assert torch.equal(decoder.final_norm.weight, state["model.norm.weight"])
    for product, expected in gguf_files.layer_products(decoder, state):
        assert isinstance(product, DenseLinear)
        assert torch.equal(product.weight, expected)
    for i, layer in enumerate(decoder.layers):
        name = f"model.layers.{i}"
        assert torch.equal(layer.attention_norm.weight, state[f"{name}.input_layernorm.weight"])
        assert torch.equal(layer.mlp_norm.weight, state[f"{name}.post_attention_layernorm.weight"])


@kinds
def test_some_rows_are_read_at_a_time(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("layerskip.model.weights._CHUNK_WEIGHTS", 5 * 64 + 1)  # five rows
    path = tmp_path / "model.gguf"
    state = gguf_files.write(path, fitting("qwen3"), kind=kind, architecture="qwen3")
    tensors = GgufFile(path)
    for dtype, (name, expected) in itertools.product((None, torch.bfloat16), state.items()):
        found = tensors.read(name, dtype)
        assert found.dtype == (dtype or torch.float32)
        assert torch.equal(found, expected.to(found.dtype))


def test_frequency_factors_are_the_llama3_scaling(tmp_path):
    model, path = reference("llama3.1"), tmp_path / "model.gguf"
    theta, head_dim = model.config.rope_parameters["rope_theta"], model.config.head_dim
    plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
    factors = plain / model.model.rotary_emb.inv_freq
    assert [factors.min(), factors.max()] == pytest.approx([1.0, 8.0])  # kept, and scaled
    gguf_files.write(path, model, extra_tensors={"rope_freqs.weight": factors.numpy()})
    tokens = token_ids("llama3.1", 2, 75)
    found = logits_of(load(path, dtype=torch.float32).decoder, tokens)
    torch.testing.assert_close(found, reference_logits(model, tokens), **TOLERANCE)


def test_wrong_row_order_would_show(tmp_path, monkeypatch):
    model, path = reference("llama2"), tmp_path / "model.gguf"
    gguf_files.write(path, model)
    family = dataclasses.replace(FAMILIES["llama"], gguf_rotary="halves")
    monkeypatch.setitem(FAMILIES, "llama", family)
    tokens = token_ids("llama2", 1, 40)
    found = logits_of(load(path, dtype=torch.float32).decoder, tokens)
    assert (found - reference_logits(model, tokens)).abs().max() > 0.5


def test_folder_with_one_file_is_that_file(tmp_path):
    model = fitting("llama2")
    gguf_files.write(tmp_path / "any-name.gguf", model, kind=GGMLQuantizationType.Q4_1)
    tokens = token_ids("llama2", 1, 9)
    folder, file = (
        logits_of(load(path, dtype=torch.float32).decoder, tokens)
        for path in (tmp_path, tmp_path / "any-name.gguf")
    )
    assert torch.equal(folder, file)


def test_what_says_the_default_may_be_said(tmp_path):
    fields = {"attention.scale": 0.25, "attention.value_length": 16, "attention.sliding_window": 4}
    fields["attention.sliding_window_pattern"] = [True] * 4
    fields = {f"llama.{name}": value for name, value in fields.items()}
    gguf_files.write(tmp_path / "m.gguf", reference("llama2"), extra_fields=fields)
    load(tmp_path / "m.gguf", dtype=torch.float32)


def test_what_a_file_may_leave_out(tmp_path):
    """Older ones do, where the value is llama.cpp's default."""
    for name in ("rope.freq_base", "attention.key_length", "attention.head_count_kv"):
        model, tokens = reference("llama2"), token_ids("llama2", 1, 40)
        gguf_files.write(tmp_path / "whole.gguf", model)
        gguf_files.write(tmp_path / "less.gguf", model, leave_out=[f"llama.{name}"])
        whole, less = (
            logits_of(load(tmp_path / file, dtype=torch.float32).decoder, tokens)
            for file in ("whole.gguf", "less.gguf")
        )
        assert torch.equal(whole, less)


def test_a_factor_alone_is_linear_scaling(tmp_path):
    for key in ("llama.rope.scaling.factor", "llama.rope.scale_linear"):
        gguf_files.write(tmp_path / "m.gguf", reference("llama2"), extra_fields={key: 4.0})
        (rope, *_) = load(tmp_path / "m.gguf", dtype=torch.float32).decoder.architecture.ropes
        assert (rope.kind, rope.factor) == ("linear", 4.0)
