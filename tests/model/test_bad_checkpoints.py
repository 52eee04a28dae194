"""What cannot be loaded is refused with one line that names it."""

import json
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from layerskip.model import CheckpointError, UnsupportedModelError, families, load
from layerskip.model.checkpoint import SettingsWarning
from tiny_models import COSTS, build, reference


def refuse(path, error, *words):
    """Loading fails with this kind of error, in one line that has all these words."""
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


@pytest.mark.parametrize("keep", [0, 5, 1000, -100], ids=lambda n: f"[:{n}]")
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuse(folder, CheckpointError, "model.safetensors", "damaged or incomplete")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": []}', "{}"])
def test_broken_index(tmp_path, content):
    reference("llama2").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    refuse(tmp_path, CheckpointError, "model.safetensors.index.json")


def test_an_index_left_by_an_earlier_save_is_not_heeded(tmp_path):
    reference("llama2").save_pretrained(tmp_path, max_shard_size="20KB")
    reference("llama2").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "gone.safetensors"}}'
    )
    load(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/model.safetensors", "a\\b"])
def test_an_index_that_names_files_elsewhere(tmp_path, file):
    reference("llama2").save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    refuse(tmp_path, CheckpointError, "names files outside of its folder")


def test_a_norm_with_a_bias_where_the_family_has_none(folder):
    change_tensors(
        folder, lambda t: t.update({"model.norm.bias": torch.zeros(len(t["model.norm.weight"]))})
    )
    refuse(folder, UnsupportedModelError, "model.norm.bias")


def test_so_many_layers_that_no_memory_holds_them(folder):
    change_json(folder / "config.json", num_hidden_layers=4_000_000_000)
    refuse(folder, CheckpointError, "config.json", "num_hidden_layers is 4000000000")


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"\xff\xfe\x00"])
def test_config_that_is_missing_or_broken(folder, content):
    path = folder / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    refuse(folder, CheckpointError, "config.json")


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": None},
        {"num_attention_heads": 0},
        {"rms_norm_eps": "small"},
        {"num_key_value_heads": 3},
    ],
    ids=str,
)
def test_config_with_nonsense(folder, fields):
    change_json(folder / "config.json", **fields)
    refuse(folder, CheckpointError, "config.json")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin", "pickle", "safetensors"]),
        ([], ["neither safetensors nor a GGUF file"]),
        (["a.gguf", "b.gguf"], ["several GGUF files"]),
        ([f"m-0000{i}-of-00002.gguf" for i in (1, 2)], ["in parts", "llama-gguf-split --merge"]),
    ],
)
def test_folder_without_usable_weights(tmp_path, names, words):
    reference("llama2").config.save_pretrained(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"")
    refuse(tmp_path, CheckpointError, *words)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        '{"assistant_early_exit": 0}',
        '{"assistant_early_exit": 2.5}',
        '{"assistant_early_exit": true}',
        '{"num_assistant_tokens": "many"}',
        '{"eos_token_id": "end"}',
        '{"eos_token_id": [1, "end"]}',
        '{"eos_token_id": {}}',
        '{"eos_token_id": -1}',
    ],
)
def test_generation_config_with_nonsense(folder, content):
    (folder / "generation_config.json").write_text(content)
    refuse(folder, CheckpointError, "generation_config.json")


@pytest.mark.parametrize("field", ["overhead", "draft_tokens_scored"])
def test_costs_with_nonsense_are_done_without(folder, field):
    costs = [{**COSTS.to_dict(), field: "much"}]
    content = json.dumps({"layerskip": {"costs": costs}})
    (folder / "generation_config.json").write_text(content)
    with pytest.warns(SettingsWarning, match=r"generation_config\.json cannot be read"):
        assert load(folder, dtype=torch.float32).settings.costs == ()


def test_tokenizer_that_cannot_be_read(folder):
    (folder / "tokenizer.json").write_text("{")
    refuse(folder, CheckpointError, "tokenizer", str(folder))


# --- tensors


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",  # this config says that the head is a matrix of its own
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.0.input_layernorm.weight",
    ],
)
def test_missing_tensor(folder, name):
    change_tensors(folder, lambda tensors: tensors.pop(name))
    refuse(folder, CheckpointError, name)


@pytest.mark.parametrize(
    "names",
    [
        ["model.layers.1.self_attn.k_proj.bias"],
        [f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"],
    ],
    ids=["one of three", "of one layer"],
)
def test_missing_biases(tmp_path, names):
    reference("qwen2").save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: [tensors.pop(name) for name in names])
    refuse(tmp_path, CheckpointError, "bias")


def test_norms_of_one_layer_missing(folder):
    names = [f"model.layers.1.self_attn.{part}_norm.weight" for part in "qk"]
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in names])
    refuse(folder, CheckpointError, names[0])


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_wrong_shape(folder, name):
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    refuse(folder, CheckpointError, name, "shape")


def test_heads_that_no_memory_holds(tmp_path):
    """Shapes are compared before anything of the config's sizes is made."""
    reference("llama2").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", head_dim=2**40)
    refuse(tmp_path, CheckpointError, "q_proj.weight", "shape")


def test_half_an_emoji_in_a_config_is_no_reason_to_stop(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path / "cache"))
    change_json(folder / "config.json", of_no_use="\ud83d")
    assert load(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.sinks",
        "model.layers.4.input_layernorm.weight",  # a layer more than the config says
        "model.layers.0.mlp.experts.0.up_proj.weight",
    ],
)
def test_tensor_without_a_use(folder, name):
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))
    refuse(folder, UnsupportedModelError, name)


# --- what the decoder does not have


@pytest.mark.parametrize("model_type", ["mamba", "gpt2", "gemma3", "made-up", None])
def test_unsupported_architecture(folder, model_type):
    change_json(folder / "config.json", model_type=model_type)
    refuse(folder, UnsupportedModelError, repr(str(model_type)), "llama, mistral, qwen2, qwen3")


def test_unsupported_activation(folder):
    change_json(folder / "config.json", hidden_act="relu2")
    refuse(folder, UnsupportedModelError, "'relu2'", "silu")


@pytest.mark.parametrize("kind", ["ntk", "mrope"])
def test_unsupported_rotary_scaling(folder, kind):
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0}
    change_json(folder / "config.json", rope_parameters=rope)
    refuse(folder, UnsupportedModelError, repr(kind), "llama3")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": {"type": "ntk", "factor": 4.0}}, "'ntk'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "mrope"}}}, "'mrope'"),
        ({"hidden_act": "relu2"}, "'relu2'"),
    ],
)
def test_what_a_stored_config_says_is_refused_before_weights_are_there(fields, words):
    with pytest.raises(UnsupportedModelError, match=words):
        families.check({"model_type": "qwen3", **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"model_type": "phi3", "rope_scaling": {"type": "su"}},  # an older word for LongRoPE
    ],
)
def test_what_a_stored_config_may_say(fields):
    families.check({"model_type": "qwen3", **fields})


@pytest.mark.parametrize(
    ("fields", "how"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "by 'gptq'"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "in MLX's format"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "in MLX's format"),
    ],
    ids=["gptq", "mlx", "older mlx"],
)
def test_unsupported_quantization(folder, fields, how):
    change_json(folder / "config.json", **fields)
    refuse(folder, UnsupportedModelError, f"weights quantized {how} are not supported")


def test_weights_that_the_config_names(folder):
    change_json(folder / "config.json", transformers_weights="other.safetensors.index.json")
    refuse(folder, UnsupportedModelError, "names its weights (other.safetensors.index.json)")


def test_a_config_nested_without_end(folder):
    (folder / "config.json").write_text('{"a":' + "[" * 100_000)
    refuse(folder, CheckpointError, "config.json cannot be read")


def test_a_sliding_window_below_none(tmp_path):
    reference("mistral").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", sliding_window=-1)
    refuse(tmp_path, CheckpointError, "config.json cannot be used: a sliding window is -1")


@pytest.mark.parametrize(("window", "seen"), [(0, None), (None, None), (2**40, 2**31 - 1), (5, 5)])
def test_sliding_windows_fit_into_32_bits(tmp_path, window, seen):
    reference("mistral").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", sliding_window=window)
    decoder = load(tmp_path, dtype=torch.float32).decoder
    assert set(decoder.architecture.sliding_windows) == {seen}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("base", ["some/base", None])
def test_adapter_without_its_base(tmp_path, weights, base):
    (tmp_path / weights).touch()
    fields = {"peft_type": "LORA", "base_model_name_or_path": base}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    named = f"its base, {base}, first" if base else "its base first"
    refuse(tmp_path, UnsupportedModelError, f"{tmp_path} is a LoRA adapter; merge it into {named}")


def test_adapter_beside_weights(folder):
    """transformers would put it on, so what answers here would be another model."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refuse(folder, UnsupportedModelError, f"{folder} has an adapter beside its weights")


# --- GGUF


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.gguf"


def test_tensor_of_gguf_without_a_number_in_it(file):
    gguf_files.write(file, reference("llama2"))
    content = bytearray(file.read_bytes())
    size = content.index(b"output_norm.weight") + len("output_norm.weight") + 4  # of a vector
    content[size : size + 8] = bytes(8)
    file.write_bytes(content)
    refuse(file, CheckpointError, "model.gguf", "damaged or incomplete")


@pytest.mark.parametrize("keep", [0, 3, 40, 2000, -100], ids=lambda n: f"[:{n}]")
def test_truncated_gguf(file, keep):
    gguf_files.write(file, reference("llama2"))
    file.write_bytes(file.read_bytes()[:keep])
    refuse(file, CheckpointError, "model.gguf", "damaged or incomplete")


def test_file_that_is_no_gguf(file):
    file.write_text("Once upon a time there was a file of another kind. " * 9)
    refuse(file, CheckpointError, "model.gguf", "damaged or incomplete")


def test_tensor_kind_that_is_newer_than_gguf(file):
    gguf_files.write(file, reference("llama2"))
    content = bytearray(file.read_bytes())
    kind = content.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8  # a vector's
    content[kind : kind + 4] = (137).to_bytes(4, "little")
    file.write_bytes(content)
    refuse(file, UnsupportedModelError, "output_norm.weight", "(137)", "upgrade gguf")


def test_file_that_may_not_be_read(file, monkeypatch):
    def refused(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refused)
    file.touch()
    with pytest.raises(CheckpointError, match=r"model\.gguf cannot be read: Permission denied$"):
        load(file, dtype=torch.float32)


@pytest.mark.parametrize("name", ["block_count", "attention.head_count", "context_length"])
def test_missing_field_of_gguf(file, name):
    gguf_files.write(file, reference("llama2"), leave_out=[f"llama.{name}"])
    refuse(file, CheckpointError, "model.gguf", f"llama.{name}")


@pytest.mark.parametrize(
    ("name", "known_as"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.1.attn_k.weight", "model.layers.1.self_attn.k_proj.weight"),
    ],
)
def test_missing_tensor_of_gguf(file, name, known_as):
    gguf_files.write(file, reference("llama2"), leave_out=[name])
    refuse(file, CheckpointError, known_as)


@pytest.mark.parametrize("name", ["blk.0.attn_sinks.weight", "blk.0.odd", "odd", "blk.odd"])
def test_tensor_of_gguf_without_a_use(file, name):
    extra = {name: np.ones(4, dtype=np.float32)}
    gguf_files.write(file, reference("llama2"), extra_tensors=extra)
    refuse(file, UnsupportedModelError, "odd" if "odd" in name else "attn_sinks")


def test_unsupported_scaling_of_gguf(file):
    fields = {"llama.rope.scaling.type": "yarn"}
    gguf_files.write(file, reference("llama2"), extra_fields=fields)
    refuse(file, UnsupportedModelError, "'yarn'")


def test_tensor_kind_that_cannot_be_read(file):
    norm = {"output_norm.weight": np.ones(64, dtype=np.int32)}
    gguf_files.write(file, reference("llama2"), leave_out=[*norm], extra_tensors=norm)
    refuse(file, UnsupportedModelError, "model.norm.weight", "I32")


def test_tokenizer_of_gguf_that_cannot_be_read(file):
    fields = {"tokenizer.ggml.model": "made-up"}
    gguf_files.write(file, build("llama2"), extra_fields=fields)
    refuse(file, UnsupportedModelError, "model.gguf has a tokenizer of the kind made-up")


def test_sentencepiece_of_gguf_without_a_score_for_each_token(file):
    fields = {"model": "llama", "tokens": ["a", "b"], "scores": [0.5]}
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    gguf_files.write(file, build("llama2"), extra_fields=named)
    refuse(
        file, CheckpointError, "has 1 scores and 2 types for 2 tokens; convert or export it again"
    )


def test_attention_to_later_positions(tmp_path):
    reference("gemma3").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", use_bidirectional_attention=True)
    refuse(tmp_path, UnsupportedModelError, "attention to later positions")


def test_attention_that_is_said_not_to_be_causal(tmp_path, file):
    reference("llama2").save_pretrained(tmp_path)
    change_json(tmp_path / "config.json", is_causal=False)
    refuse(tmp_path, UnsupportedModelError, "attention to later positions")
    gguf_files.write(file, reference("llama2"), extra_fields={"llama.attention.causal": False})
    refuse(file, UnsupportedModelError, "attention to later positions")


def test_norms_of_queries_and_keys_are_the_familys(folder, tmp_path_factory):
    change_tensors(folder, lambda t: [t.pop(name) for name in [*t] if "q_norm" in name])
    refuse(folder, CheckpointError, "has no tensor model.layers.0.self_attn.q_norm.weight")
    other = tmp_path_factory.mktemp("llama")
    reference("llama2").save_pretrained(other)
    name = "model.layers.0.self_attn.q_norm.weight"
    change_tensors(other, lambda t: t.update({name: torch.ones(16)}))
    refuse(other, UnsupportedModelError, name)
