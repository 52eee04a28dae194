"""Checkpoints that cannot be loaded are refused, with one line that names the reason."""

import json
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file

from layerskip.fileio import check_links
from layerskip.model import CheckpointError, UnsupportedModelError, families, load
from layerskip.model.checkpoint import SettingsWarning, check_folder, open_files
from layerskip.model.weights import check_finite
from tiny_models import COSTS, build, reference


def refuse(path, error, *words):
    """Loading fails with this class of error, in one line that has all these words."""
    with pytest.raises(error) as caught:
        load(path, dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message, message
    assert all(word in message for word in words), message


@pytest.fixture
def folder(tmp_path):
    reference("qwen3").save_pretrained(tmp_path)
    return tmp_path


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --- files


def test_missing_shard(tmp_path):
    reference("llama2").save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[3]
    shard.unlink()
    refuse(tmp_path, CheckpointError, shard.name, "missing")


@pytest.mark.parametrize("keep", [1000, -100])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(folder, CheckpointError, "model.safetensors", "damaged or incomplete")


@pytest.mark.parametrize("content", ["{", '{"weight_map": []}'])
def test_broken_index(tmp_path, content):
    reference("llama2").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refuse(tmp_path, CheckpointError, "model.safetensors.index.json")


def test_an_index_of_an_earlier_save_is_ignored(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone"}}')
    load(folder, dtype=torch.float32)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/model.safetensors"])
def test_an_index_that_names_files_elsewhere(tmp_path, file):
    reference("llama2").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    refuse(tmp_path, CheckpointError, "names files outside of its folder")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin", "pickle", "safetensors"]),
        ([], ["neither safetensors nor a GGUF file"]),
        (["a.gguf", "b.gguf"], ["several GGUF files"]),
        ([f"m-0000{i}-of-00002.gguf" for i in (1, 2)], ["-00001-of-00002.gguf is damaged"]),
    ],
)
def test_folder_without_usable_weights(tmp_path, names, words):
    reference("llama2").config.save_pretrained(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    refuse(tmp_path, CheckpointError, *words)


@pytest.mark.parametrize("base", ["some/base", None])
def test_adapter_without_its_base(tmp_path, base):
    fields = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    into = f"its base, {base}, first" if base else "its base first"
    refuse(tmp_path, UnsupportedModelError, f"{tmp_path} is a LoRA adapter; merge it into {into}")


def test_adapter_beside_weights(folder):
    """transformers would apply it, so the outputs here would be another model's."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refuse(folder, UnsupportedModelError, f"{folder} has an adapter beside its weights")


def test_links_out_of_a_folder(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("other") / "secret"
    secret.touch()
    check_links(folder)
    (folder / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a link to .*secret"):
        check_links(folder)


# --- config.json


@pytest.mark.parametrize("content", [None, b"[]", b"\xff\xfe\x00", b'{"a":' + b"[" * 100_000])
def test_config_that_is_missing_or_broken(folder, content):
    path = folder / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    refuse(folder, CheckpointError, "config.json")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_labels": 10**9}, "num_labels is 1000000000"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
    ],
)
def test_impossible_sizes_are_refused_before_memory_is_allocated(folder, fields, words):
    change_json(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=words):  # as training does, for any model type
        check_folder(folder)
    refuse(folder, CheckpointError, "config.json", words)


@pytest.mark.parametrize(
    "fields", [{"num_hidden_layers": None}, {"rms_norm_eps": "small"}, {"num_key_value_heads": 3}]
)
def test_config_with_impossible_values(folder, fields):
    change_json(folder / "config.json", **fields)
    refuse(folder, CheckpointError, "config.json cannot be used")


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"partial_rotary_factor": -1}, "partial_rotary_factor is -1, it has to be"),
        ({"rope_type": "linear", "factor": 0}, "the factor of rotary scaling is 0"),
        ({"rope_type": "longrope", "long_factor": []}, "long_factor of rotary scaling is []"),
        ({"rope_theta": -1}, "rope_theta is -1"),
    ],
)
def test_impossible_rotary_embeddings(folder, rope, words):
    change_json(folder / "config.json", rope_parameters={"rope_theta": 10_000.0, **rope})
    refuse(folder, CheckpointError, "config.json cannot be used", words)


@pytest.mark.parametrize("model_type", ["gpt2", None])
def test_unsupported_architecture(folder, model_type):
    change_json(folder / "config.json", model_type=model_type)
    refuse(folder, UnsupportedModelError, repr(str(model_type)), "llama, mistral, qwen2, qwen3")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_act": "relu2"}, "'relu2'"),
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}, "rope_parameters": None}, "'ntk'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "mrope"}}}, "'mrope'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized by 'gptq'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized in MLX's format"),
        ({"transformers_weights": "x.safetensors"}, "names its weights (x.safetensors)"),
        ({"is_causal": False}, "attention to later positions"),
    ],
)
def test_unsupported_features_are_refused_before_weights_are_fetched(folder, fields, words):
    change_json(folder / "config.json", **fields)
    refuse(folder, UnsupportedModelError, words)
    with pytest.raises(UnsupportedModelError):  # as `hub` does with the config alone
        families.check(json.loads((folder / "config.json").read_text()))


def test_stored_configs_that_are_supported():
    for fields in (
        {"rope_scaling": None},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"model_type": "phi3", "rope_scaling": {"type": "su"}},  # an older word for LongRoPE
    ):
        families.check({"model_type": "qwen3", **fields})


def test_transformers_logs_nothing_about_a_config(folder, caplog, monkeypatch, capfd):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(folder / "cache"))
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "odd": 1}
    change_json(folder / "config.json", eos_token_id=10**6, rope_parameters=rope)
    open_files(folder)
    assert not caplog.records
    assert not capfd.readouterr().err


def test_a_lone_surrogate_in_a_config_is_no_reason_to_stop(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    change_json(folder / "config.json", of_no_use="\ud83d")
    assert load(folder, dtype=torch.float32)


def test_sliding_windows_fit_into_32_bits(tmp_path):
    for window, expected in ((0, None), (2**40, 2**31 - 1), (5, 5)):
        reference("mistral").save_pretrained(tmp_path)
        change_json(tmp_path / "config.json", sliding_window=window)
        assert set(open_files(tmp_path).architecture.sliding_windows) == {expected}
        change_json(tmp_path / "config.json", sliding_window=-1)
        refuse(tmp_path, CheckpointError, "config.json cannot be used: a sliding window is -1")


# --- generation_config.json and tokenizers


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"assistant_early_exit": 0}',
        '{"num_assistant_tokens": "many"}',
        '{"eos_token_id": [1, "end"]}',
    ],
)
def test_generation_config_with_impossible_values(folder, content):
    (folder / "generation_config.json").write_text(content)
    refuse(folder, CheckpointError, "generation_config.json")


@pytest.mark.parametrize("field", ["overhead", "draft_tokens_scored"])
def test_unreadable_costs_are_ignored_with_a_warning(folder, field):
    costs = [{**COSTS.to_dict(), field: "much"}]
    content = json.dumps({"layerskip": {"costs": costs}})
    (folder / "generation_config.json").write_text(content)
    with pytest.warns(SettingsWarning, match=r"generation_config\.json cannot be read"):
        assert load(folder, dtype=torch.float32).settings.costs == ()


def test_tokenizer_that_cannot_be_read(folder):
    (folder / "tokenizer.json").write_text("{")
    refuse(folder, CheckpointError, "tokenizer", str(folder))


def test_tokenizer_model_alone_without_sentencepiece(folder, monkeypatch):
    monkeypatch.setattr("layerskip.model.tokenizer._is_installed", lambda module: False)
    (folder / "tokenizer.model").touch()
    refuse(folder, CheckpointError, "needs sentencepiece", "pip install sentencepiece")


# --- tensors


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",  # this config has a head of its own
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
    ],
)
def test_missing_tensor(folder, name):
    change_tensors(folder, lambda tensors: tensors.pop(name))
    refuse(folder, CheckpointError, name)


@pytest.mark.parametrize("parts", ["k", "qkv"], ids=["one of three", "of one layer"])
def test_missing_biases(tmp_path, parts):
    reference("qwen2").save_pretrained(tmp_path)
    names = [f"model.layers.1.self_attn.{part}_proj.bias" for part in parts]
    change_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in names])
    refuse(tmp_path, CheckpointError, "bias")


def test_wrong_shape(folder):
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refuse(folder, CheckpointError, name, "shape")


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_not_floating_point(folder, dtype):
    name = "model.layers.1.mlp.down_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refuse(folder, UnsupportedModelError, f"{name} is stored as", "F32, F16, BF16, F64")


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("model.embed_tokens.weight", "16bit"),
        ("lm_head.weight", "16bit"),
        ("model.layers.0.post_attention_layernorm.weight", "16bit"),
        ("model.norm.weight", "int8"),
        ("model.embed_tokens.weight", "int8"),
        ("model.layers.1.mlp.down_proj.weight", "int8"),
        ("model.layers.1.self_attn.k_proj.weight", "int4"),
    ],
)
@pytest.mark.parametrize("number", ["nan", "-inf"])
def test_non_finite_weights_are_named(compiled_kernels, tmp_path, name, weights, number):
    reference("llama2").save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors[name].view(-1)[-1:].fill_(float(number)))
    with pytest.raises(CheckpointError, match=rf"{name}( or .*)? holds NaN or Inf: the check") as e:
        load(tmp_path, dtype=torch.float32, weights=weights, compiled=True)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_K"])
def test_non_finite_scales_of_stored_blocks_are_named(compiled_kernels, tmp_path, kind):
    """Each block begins with a float16 scale, and in some formats an offset."""
    file, kind = tmp_path / "m.gguf", GGMLQuantizationType[kind]
    model = build("llama2", hidden_size=256, intermediate_size=256)
    gguf_files.write(file, model, kind=kind)
    (tensor,) = (t for t in GGUFReader(file, "r+").tensors if t.name == "blk.1.ffn_down.weight")
    last_block = tensor.data.reshape(-1, GGML_QUANT_SIZES[kind][1])[-1]
    for begin in (0,) if kind == GGMLQuantizationType.Q8_0 else (0, 2):
        before = last_block[begin : begin + 2].copy()
        last_block[begin : begin + 2] = np.array([np.nan], np.float16).view(np.uint8)
        with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.* holds NaN or Inf"):
            load(file, dtype=torch.float32, weights="stored", compiled=True)
        last_block[begin : begin + 2] = before
    load(file, dtype=torch.float32, weights="stored", compiled=True)


def test_non_finite_weights():
    check_finite("x", torch.ones(2))
    for number in ("nan", "inf"):
        with pytest.raises(CheckpointError, match="x holds NaN or Inf"):
            check_finite("x", torch.tensor([1.0, float(number)]))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("qwen3", "model.layers.0.self_attn.sinks"),
        ("qwen3", "model.layers.4.input_layernorm.weight"),  # a layer more than in the config
        ("qwen3", "model.norm.bias"),
        ("llama2", "model.layers.0.self_attn.q_norm.weight"),  # of another family
    ],
)
def test_unused_tensor(tmp_path, case, name):
    reference(case).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    refuse(tmp_path, UnsupportedModelError, name)


# --- GGUF


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


def test_empty_tensor_in_gguf(file):
    gguf_files.write(file, reference("llama2"))
    content = bytearray(file.read_bytes())
    size = content.index(b"output_norm.weight") + len("output_norm.weight") + 4  # of a vector
    content[size : size + 8] = bytes(8)
    file.write_bytes(content)
    refuse(file, CheckpointError, "model.gguf", "damaged or incomplete")


def test_truncated_gguf(file):
    for keep in (2000, -100):
        gguf_files.write(file, reference("llama2"))
        file.write_bytes(file.read_bytes()[:keep])
        refuse(file, CheckpointError, "model.gguf", "damaged or incomplete")


def test_tensor_type_that_is_newer_than_gguf(file):
    gguf_files.write(file, reference("llama2"))
    content = bytearray(file.read_bytes())
    kind = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # of a vector
    content[kind : kind + 4] = (137).to_bytes(4, "little")
    file.write_bytes(content)
    refuse(file, UnsupportedModelError, "output_norm.weight", "(137)", "upgrade gguf")


def test_file_without_permission_to_read(file, monkeypatch):
    def refused(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    file.touch()
    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read: Permission denied$"):
        load(file, dtype=torch.float32)


def test_missing_field_of_gguf(file):
    gguf_files.write(file, reference("llama2"), leave_out=["llama.block_count"])
    refuse(file, CheckpointError, "model.gguf", "llama.block_count")


def test_impossible_fields_of_gguf(file):
    for fields, words in (
        ({"block_count": 4_000_000_000}, "block_count is 4000000000"),
        ({"attention.head_count": 2**31}, "attention.head_count is 2147483648"),
        ({"embedding_length": 63}, "embedding_length is 63"),
        ({"context_length": 0}, "max_context is 0"),
        ({"rope.freq_base": float("inf")}, "rope_theta is inf"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "the epsilon of norms is nan"),
    ):
        fields = {f"llama.{name}": value for name, value in fields.items()}
        gguf_files.write(file, reference("llama2"), extra_fields=fields)
        with pytest.raises(CheckpointError, match=words):
            open_files(file)


def test_missing_tensor_of_gguf(file):
    for name, known_as in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight"),
    ):
        gguf_files.write(file, reference("llama2"), leave_out=[name])
        refuse(file, CheckpointError, known_as)


def test_unused_tensor_of_gguf(file):
    for name in ("blk.0.attn_sinks.weight", "odd"):
        extra = {name: np.ones(4, dtype=np.float32)}
        gguf_files.write(file, reference("llama2"), extra_tensors=extra)
        refuse(file, UnsupportedModelError, "odd" if name == "odd" else "attn_sinks")


def test_tensor_type_that_cannot_be_read(file):
    norm = {"output_norm.weight": np.ones(64, dtype=np.int32)}
    gguf_files.write(file, reference("llama2"), leave_out=[*norm], extra_tensors=norm)
    refuse(file, UnsupportedModelError, "model.norm.weight", "I32")


def test_unsupported_fields_of_gguf(file):
    for fields, words in (
        ({"llama.rope.scaling.type": "yarn"}, "'yarn'"),
        ({"llama.attention.causal": False}, "attention to later positions"),
        ({"llama.rope.dimension_count": 8}, "a part of each head"),
        ({"llama.attention.scale": 0.5}, "attention scaled by 0.5"),
        ({"llama.attention.value_length": 8}, "values of another length"),
        (
            {"llama.attention.sliding_window": 4}
            | {"llama.attention.sliding_window_pattern": [True, False, True, False]},
            "a sliding window of some layers",
        ),
        ({"tokenizer.ggml.model": "made-up"}, "has a tokenizer of the kind made-up"),
    ):
        gguf_files.write(file, build("llama2"), extra_fields=fields)
        refuse(file, UnsupportedModelError, words)


def test_a_family_that_is_not_read_from_gguf(file):
    """Their tensors have Llama's names: without this check outputs would be wrong."""
    for fields, name, words in (
        (
            {},
            "stablelm",
            "GGUF files of stablelm models are not read (llama, qwen2, qwen3, gemma2,",
        ),
        (
            {"qwen3.expert_count": 8},
            "qwen3",
            "GGUF files of qwen3 models with experts are not read",
        ),
        ({}, "qwen3moe", "GGUF files of qwen3moe models without experts are not read"),
    ):
        gguf_files.write(file, reference("llama2"), architecture=name, extra_fields=fields)
        refuse(file, UnsupportedModelError, words)


def test_inconsistent_parts_and_experts_of_gguf(file):
    experts = np.ones((4, 40, 64), dtype=np.float32)
    for fields, tensors, words in (
        ({"llama.expert_count": 8}, {}, "no field llama.expert_used_count"),
        ({"llama.expert_count": 8}, {"blk.0.ffn_up_exps.weight": experts}, "expert_count is 8"),
        ({"split.count": 3}, {}, "is one of 3 parts; their names have to end in"),
    ):
        gguf_files.write(file, reference("llama2"), extra_fields=fields, extra_tensors=tensors)
        refuse(file, CheckpointError, words)


def test_sentencepiece_of_gguf_without_a_score_for_each_token(file):
    fields = {"model": "llama", "tokens": ["a", "b"], "scores": [0.5]}
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    gguf_files.write(file, build("llama2"), extra_fields=named)
    refuse(
        file, CheckpointError, "has 1 scores and 2 types for 2 tokens; convert or export it again"
    )
