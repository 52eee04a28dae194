"""GGUF files against our loader, transformers' reader, and a converter of the tests' own."""

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from exported_cases import WRITTEN

import tiny_models
from layerskip.export import GGUF_WEIGHTS, open_source, source, to_gguf
from layerskip.model import UnsupportedModelError, load, open_files
from tiny_models import LAYERS, token_ids

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}  # float32
# transformers' reader knows neither windows, scaled rotary embedding nor biases of Llama, and no
# head size but its default, which is 128 in Qwen3.
READ_BY_TRANSFORMERS = ["llama2", "mistral-unlimited", "qwen2-tied", "qwen3"]


def fitting(case, folder):
    """Save a case with rows that are whole blocks of 32, and heads as wide as its hidden states."""
    model = tiny_models.build(case, hidden_size=128, head_dim=32, intermediate_size=96)
    model.save_pretrained(folder)
    return model


def tensors_of(path):
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("case", WRITTEN)
def test_our_loader_reads_the_same_model_from_it(case, saved, ours, tmp_path):
    written = to_gguf(open_source(saved(case)), tmp_path / "m.gguf", weights="f32")
    assert written.tied_head == tiny_models.reference(case).config.tie_word_embeddings
    tokens = token_ids(case, 40)
    found, expected = ours(tmp_path / "m.gguf", tokens), ours(saved(case), tokens)
    if case in ("llama3.1", "llama3.2"):  # their scaling becomes factors, which rounds
        torch.testing.assert_close(found, expected, **TOLERANCE)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model_from_it(case, theirs, tmp_path):
    model = tiny_models.build(case, **({"head_dim": 128} if case == "qwen3" else {}))
    model.save_pretrained(tmp_path)
    to_gguf(open_source(tmp_path), tmp_path / "m.gguf", weights="f32")
    tokens = token_ids(case, 40)
    found = theirs(tmp_path / "m.gguf", tokens)
    torch.testing.assert_close(found, theirs(tmp_path, tokens), **TOLERANCE)


@pytest.mark.parametrize(
    ("weights", "case"), [*((kind, "llama2") for kind in GGUF_WEIGHTS), ("q4_0", "qwen2-tied")]
)
def test_every_byte_is_that_of_another_converter(case, weights, tmp_path):
    model = fitting(case, tmp_path)
    to_gguf(open_source(tmp_path), tmp_path / "ours.gguf", weights=weights)
    kind, arch = GGUF_WEIGHTS[weights], model.config.model_type
    gguf_files.write(tmp_path / "other.gguf", model, kind=kind, architecture=arch)
    found, expected = tensors_of(tmp_path / "ours.gguf"), tensors_of(tmp_path / "other.gguf")
    if weights.startswith("q4"):  # embedding and head are finer
        finer = {"token_embd.weight": model.model.embed_tokens, "output.weight": model.lm_head}
        for name in finer.keys() & expected.keys():
            matrix = finer[name].weight.detach().numpy()
            q8_0 = gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)
            expected[name] = ("Q8_0", q8_0.tobytes())
    assert found == expected


def test_a_row_that_is_not_whole_blocks_is_f16(saved, tmp_path):
    model = tiny_models.build("llama2", intermediate_size=80)
    model.save_pretrained(tmp_path)
    to_gguf(open_source(tmp_path), tmp_path / "m.gguf", weights="q8_0")
    kinds = {name: kind for name, (kind, _) in tensors_of(tmp_path / "m.gguf").items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16"  # [64, 80]
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"  # [80, 64]
    assert kinds["blk.0.ffn_norm.weight"] == "F32"


@pytest.mark.parametrize("weights", [None, "q4_1"])
def test_blocks_are_carried_over_and_not_quantized_twice(weights, tmp_path):
    fitting("llama2", tmp_path)
    first = to_gguf(open_source(tmp_path), tmp_path / "first.gguf", weights="q4_1")
    again = to_gguf(open_source(first.path), tmp_path / "again.gguf", weights=weights)
    assert tensors_of(again.path) == tensors_of(first.path)
    assert again.carried_over == again.tensors == 3 + 9 * LAYERS
    assert first.carried_over == 1 + 2 * LAYERS  # vectors, float32 in the source too


def test_another_kind_is_made_from_the_numbers_that_blocks_stand_for(ours, tmp_path):
    fitting("qwen2-tied", tmp_path)
    first = to_gguf(open_source(tmp_path), tmp_path / "first.gguf", weights="q4_0")
    to_gguf(open_source(first.path), tmp_path / "again.gguf", weights="f32")
    tokens = token_ids("qwen2-tied", 30)
    assert torch.equal(ours(tmp_path / "again.gguf", tokens), ours(first.path, tokens))


@pytest.mark.parametrize(("case", "exit_layer"), [("llama3.2", 1), ("qwen2-tied", 3)])
def test_a_draft_is_our_early_exit(case, exit_layer, saved, ours, tmp_path):
    written = to_gguf(open_source(saved(case), exit_layer), tmp_path / "d.gguf", weights="f32")
    assert written.layers == exit_layer
    tokens = token_ids(case, 40)
    found, expected = ours(written.path, tokens), ours(saved(case), tokens, exit_layer)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    again = to_gguf(open_source(written.path, 1), tmp_path / "first.gguf")
    torch.testing.assert_close(ours(again.path, tokens), ours(saved(case), tokens, 1), **TOLERANCE)


def test_metadata_says_what_the_config_says(saved, tmp_path):
    to_gguf(open_source(saved("llama3.2")), tmp_path / "m.gguf", weights="q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {key: field.contents() for key, field in reader.fields.items()}
    assert found["general.architecture"] == "llama"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert found["llama.rope.dimension_count"] == 16
    assert found["llama.block_count"] == LAYERS
    assert found["llama.rope.freq_base"] == 1000.0
    assert "llama.rope.scaling.type" not in found
    factors = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    assert [factors.min(), factors.max()] == pytest.approx([1.0, 8.0])
    assert factors.dtype == np.float32


def test_fields_of_a_gguf_source_are_carried_over(tmp_path):
    model = fitting("llama2", tmp_path / "hf")
    fields = {"general.license": "apache-2.0", "general.quantization_version": 2}
    gguf_files.write(tmp_path / "a.gguf", model, extra_fields=fields, tokenizer="smollm")
    to_gguf(open_source(tmp_path / "a.gguf", 2), tmp_path / "b.gguf")
    first, second = (
        {key: (value, types) for key, value, types in open_files(tmp_path / name).tensors.fields()}
        for name in ("a.gguf", "b.gguf")
    )
    changed = {key for key in first | second if first.get(key) != second.get(key)}
    assert changed == {"general.file_type", "llama.block_count"}
    assert second["llama.block_count"][0] == 2


def test_every_end_token_of_a_checkpoint_survives(saved, tmp_path):
    model = tiny_models.build("llama2")
    model.generation_config.eos_token_id = [5, 2, 9]
    model.save_pretrained(tmp_path)
    to_gguf(open_source(tmp_path), tmp_path / "m.gguf")
    assert load(tmp_path / "m.gguf", dtype=torch.float32).settings.end_tokens == (5, 2, 9)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("qwen2", tiny_models.CASES["llama3.1"][1], "rotary embedding has no place"),
        ("llama-yarn", {}, "rotary embedding has no place"),
        ("qwen3", {"attention_bias": True}, "this qwen3 model has biases in its attention"),
        ("qwen2-sliding", {}, "has different attention windows in its layers"),
        ("llama2", {"hidden_act": "gelu_pytorch_tanh"}, "has the activation gelu_tanh"),
        ("qwen2", {"head_dim": 32}, "has 4 heads of 32 beside a hidden size of 64"),
    ],
)
def test_what_llama_cpp_does_not_load_is_refused(case, changes, message, tmp_path):
    tiny_models.build(case, **changes).save_pretrained(tmp_path / "in")
    with pytest.raises(UnsupportedModelError, match=rf"{message}.*--to hf"):
        to_gguf(open_source(tmp_path / "in"), tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_family_that_is_not_exported_is_named(saved, monkeypatch):
    monkeypatch.setattr(source, "FAMILIES", ("qwen2", "qwen3"))
    with pytest.raises(UnsupportedModelError, match=r"llama models cannot .*: qwen2, qwen3"):
        open_source(saved("llama2"))


@pytest.mark.parametrize("exit_layer", [LAYERS + 1])
def test_an_exit_that_is_not_there_is_refused(exit_layer, saved):
    with pytest.raises(
        ValueError, match=f"exit layer is {exit_layer}, this model has exits 1 to 4"
    ):
        open_source(saved("llama2"), exit_layer)


def test_bad_names_are_refused(saved, tmp_path):
    for name, weights in (("m.bin", "f32"), ("m.gguf", "q5_k")):
        with pytest.raises(ValueError, match=r"end in \.gguf|f32, f16, bf16, q8_0, q4_0, q4_1"):
            to_gguf(open_source(saved("llama2")), tmp_path / name, weights=weights)
