"""Models and tokenizers that can be trained, and those that are refused in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf_files
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, OPTConfig, OPTForCausalLM

import tiny_models
from layerskip.errors import TrainingWarning
from layerskip.training import TrainConfig, loading, train
from layerskip.training.loading import (
    arithmetic,
    check_files,
    check_packing,
    check_positions,
    check_tokens,
    load_model,
    load_tokenizer,
    model_config,
    pretrained_model,
)
from layerskip.training.run import check_layers, transformers_can_exit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def model(model_folder, tmp_path):
    """A copy of a model's folder."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def config_of(model, **changes):
    return TrainConfig.from_mapping({"model": str(model), "data": "d", "output": "o", **changes})


def change_json(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change_weights(model, change):
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


NAME = "model.layers.2.mlp.up_proj.weight"


def test_weights_are_not_made_up(model):
    change_weights(model, lambda t: t.update(value_head=torch.ones(3)))
    with pytest.warns(TrainingWarning, match="knows nothing of, such as value_head: they are left"):
        pretrained_model(str(model))
    change_weights(model, lambda t: t.update({NAME: torch.ones(3, 4)}))
    with pytest.raises(ValueError, match=f"has another shape of {NAME}"):
        pretrained_model(str(model))
    change_weights(model, lambda t: t.pop(NAME))
    with pytest.raises(ValueError, match=f"lacks {NAME}, which its config.json asks for"):
        pretrained_model(str(model))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model, number):
    change_weights(model, lambda t: t[NAME].view(-1)[3:4].fill_(number))
    with pytest.raises(ValueError, match=f"^{NAME} holds NaN or Inf"):
        pretrained_model(str(model))


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.int64, "I64"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_weights_of_other_dtypes_are_refused(model, dtype, stored):
    change_weights(model, lambda t: t.update({NAME: t[NAME].to(dtype)}))
    with pytest.raises(ValueError, match=f"^{NAME} is stored as {stored}, weights in"):
        check_files(str(model))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "additional_chat_templates/x.jinja"])
def test_links_out_of_the_folder_are_refused(model, tmp_path, name):
    secret, link = tmp_path / "secret", model / name
    secret.write_text("{}")
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret)
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside of its folder"):
        check_files(str(model))


def test_a_repository_of_the_hub_is_checked_as_a_folder(model, tmp_path, monkeypatch):
    fetched = []

    def fetch_files(name, patterns):
        fetched.append(patterns)
        return model

    monkeypatch.setattr(loading, "fetch_files", fetch_files)
    change_weights(model, lambda t: t.update({NAME: t[NAME].to(torch.int64)}))
    with pytest.raises(ValueError, match=f"^{NAME} is stored as I64, weights in"):
        pretrained_model("owner/name")
    assert ["model*.safetensors" in patterns for patterns in fetched] == [False, True]
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside of its folder"):
        load_tokenizer(config_of("owner/name"))

    with pytest.raises(
        ValueError, match=r"^GGUF files cannot be trained: .* of owner/name:Q4_0 first"
    ):
        model_config("owner/name:Q4_0")


def test_a_repository_that_cannot_be_fetched(monkeypatch):
    def refused(*_, **__):
        raise OSError("401 Client Error (Request ID 1)\n\nAccess is restricted.")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refused)
    with pytest.raises(ValueError, match=r"^owner/name cannot be fetched .* Access is restricted;"):
        model_config("owner/name")


def test_files_that_transformers_would_add_are_refused(model, tmp_path):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')
    with pytest.raises(ValueError, match="has an adapter beside its weights: merge it"):
        check_files(str(model))
    (model / "adapter_config.json").unlink()
    (model / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {"lm_head.weight": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        check_files(str(model))


def test_what_can_only_be_decoded_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    file.touch()
    for name in (file, tmp_path):
        with pytest.raises(ValueError, match=f"^GGUF files cannot be trained: .* of {name} first"):
            check_files(str(name))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match=r"is a LoRA adapter; merge it into its base, some/base,"):
        check_files(str(tmp_path))
    monkeypatch.setattr(loading, "fetch_files", lambda *_: tmp_path)
    with pytest.raises(ValueError, match=r"^owner/name on the hub is or has an adapter: merge it"):
        model_config("owner/name")


def test_a_pickle_is_not_read(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"could not be loaded: .*safetensors"):
        pretrained_model(str(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"text_config": {"vocab_size": 10**12}},
            r"config\.json cannot be used: vocab_size is 1000000000000",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "^weights quantized by 'gptq'"),
        ({"transformers_weights": "other.safetensors"}, "^a config that names its weights"),
        ({"is_causal": False}, "attention to later positions"),
        ({"partial_rotary_factor": -1}, "partial_rotary_factor is -1, it has to be a number above"),
        ({"rope_parameters": {"rope_type": "new"}}, "rotary scaling 'new' is not supported"),
        ({"hidden_size": 33}, "hidden size .33. is not a multiple of the number of attention"),
    ],
)
def test_configs_are_refused_at_once(model, fields, message):
    change_json(model / "config.json", **fields)
    with pytest.raises(ValueError, match=message) as error:
        model_config(str(model))
    assert "\n" not in str(error.value)


def test_weights_larger_than_the_memory_are_refused(model):
    change_json(model / "config.json", hidden_size=2**20, intermediate_size=2**20)
    for from_scratch in (False, True):
        with pytest.raises(ValueError, match=r"take .* GB in float32, and this machine has"):
            load_model(config_of(model, from_scratch=from_scratch))


def test_a_config_of_another_version_names_no_other_weights(model):
    """transformers reads it in place of config.json."""
    file = model / "config.5.0.0.json"
    shutil.copy(model / "config.json", file)
    change_json(file, transformers_weights="other.safetensors")
    change_json(model / "config.json", configuration_files=[file.name])
    with pytest.raises(ValueError, match=r"^a config that names its weights \(other\."):
        model_config(str(model))


@pytest.mark.parametrize("from_scratch", [True, False])
def test_a_config_names_no_kernels(model, from_scratch):
    """transformers would fetch compiled code from the hub and run it."""
    kernels = {"_attn_implementation": "some/kernels", "experts_implementation": "some/kernels"}
    change_json(model / "config.json", attn_implementation="some/kernels", **kernels)
    loaded = load_model(config_of(model, from_scratch=from_scratch))
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", 900, "model.safetensors is damaged or incomplete"),
        ("tokenizer.json", 25, "no tokenizer in .*model: Unterminated string"),
        ("config.json", 25, r"config\.json cannot be read: "),
        ("tokenizer_config.json", "[]", "no tokenizer in "),
    ],
)
def test_a_broken_file_is_named(model, name, content, message):
    file = model / name
    is_cut = isinstance(content, int)
    file.write_bytes(file.read_bytes()[:content] if is_cut else content.encode())
    load = load_tokenizer if name.startswith("tokenizer") else load_model
    with pytest.raises(ValueError, match=message) as error:
        load(config_of(model))
    assert "\n" not in str(error.value)


def test_only_our_own_line_is_on_stderr(model, data_file, tmp_path):
    """transformers would log a report of missing weights, and doubts about the config."""
    change_weights(model, lambda t: t.pop(NAME))
    rope = {"rope_type": "linear", "factor": 0.5, "rope_theta": 1e4}
    change_json(model / "config.json", rope_parameters=rope)
    change_json(model / "generation_config.json", eos_token_id=10**6)
    command = [Path(sys.executable).with_name("layerskip"), "train", "--model", model]
    command += ["--data", data_file, "--output", tmp_path / "out", "--regime", "task"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"lacks {NAME}" in done.stderr


def test_a_tokenizer_without_pad_and_end_tokens(model, data_file, tmp_path):
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := model / name).exists():
            fields = json.loads(file.read_text())
            for token in ("pad_token", "eos_token"):
                fields.pop(token, None)
            file.write_text(json.dumps(fields))
    changes = {"data": data_file, "output": str(tmp_path / "out"), "regime": "task"}
    assert train(config_of(model, max_steps=1, device="cpu", **changes)).steps == 1


def test_rows_that_do_not_fit_the_model_are_refused(model_folder):
    from datasets import Dataset

    loaded = pretrained_model(model_folder)
    rows = Dataset.from_list([{"input_ids": [1] * 65}, {"input_ids": [48]}])
    with pytest.raises(ValueError, match="a row has 65 tokens, but this model knows 64 positions"):
        check_positions(loaded, rows, None)
    check_positions(loaded, rows.add_column("position_ids", [[0, 1], [0]]))  # packed documents
    with pytest.raises(ValueError, match="have the token 48, but this model embeds 48"):
        check_tokens(loaded, 0, rows, None)
    with pytest.raises(ValueError, match="or their padding have the token 50"):
        check_tokens(loaded, 50, rows.select([0]))


def test_packing_is_for_models_that_separate_documents(model_folder):
    """OPT counts positions, but lets a document attend to the one before it."""
    check_packing(pretrained_model(model_folder))
    config = OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="packing needs attention that ends where positions start"):
        check_packing(OPTForCausalLM(config))


def test_short_rows_use_eager_attention(model_folder):
    for batch_size, kind in ((4, "eager"), (10_000, "sdpa")):
        config = config_of(model_folder, max_length=128, batch_size=batch_size, device="cpu")
        assert load_model(config).config._attn_implementation == kind


@pytest.mark.parametrize(
    ("precision", "expected"), [("float32", torch.float32), ("float16", torch.float32),
                                ("bfloat16", torch.bfloat16)]
)  # fmt: skip
def test_frozen_weights_stay_in_bfloat16(model, precision, expected):
    """In float16 the exits' gradients would underflow, so head and norm are in float32."""
    dtype = torch.float16 if precision == "float16" else torch.bfloat16
    AutoModelForCausalLM.from_pretrained(model).to(dtype).save_pretrained(model)
    loaded = load_model(config_of(model, lora_rank=4, precision=precision))
    assert {p.dtype for p in loaded.parameters()} == {expected}


def test_auto_is_the_faster_precision(monkeypatch):
    for capability, bfloat16_s, expected in (
        ("AVX512", 1.0, torch.bfloat16),
        ("AVX512", 3.0, torch.float32),
        ("AVX2", 1.0, torch.float32),
    ):
        seconds = {torch.bfloat16: bfloat16_s, torch.float32: 2.0}
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        monkeypatch.setattr("layerskip.model.hardware._product_s", seconds.__getitem__)
        assert arithmetic(config_of("m", precision="auto", device="cpu")) == expected


def test_the_exit_for_decoding(tmp_path):
    for layers, recipe, expected in (
        (12, {"curriculum": "all"}, 3),
        (16, {"curriculum": "all", "exit_weighting": "linear"}, 4),
        (12, {"curriculum": "all", "exits": (2, 4)}, 2),  # of two as near, the cheaper one
        (12, {"curriculum": "all", "exits": (5,)}, 5),
        (12, {"curriculum": "none"}, 3),
        (12, {"fixed_exits": (4, 3)}, 3),
    ):
        LlamaConfig(num_hidden_layers=layers).save_pretrained(tmp_path)
        assert check_layers(config_of(tmp_path, **recipe)) == expected, recipe


def test_a_built_in_gguf_file_is_dequantized_without_a_progress_bar(tmp_path, monkeypatch, capfd):
    model = tiny_models.build("llama2")
    fields = {"llama.vocab_size": model.config.vocab_size}
    gguf_files.write(tmp_path / "model.gguf", model, extra_fields=fields)
    monkeypatch.setattr("layerskip.training.loading.pull", lambda name: tmp_path)
    loaded = pretrained_model("smollm2-135m").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor)
    assert "Converting" not in capfd.readouterr().err


def test_transformers_can_exit(model_folder):
    assert transformers_can_exit(pretrained_model(model_folder), 2)
    assert AutoTokenizer.from_pretrained(model_folder)


def test_gpus(model_folder, tmp_path, data_file, monkeypatch):
    config = {"data": data_file, "output": str(tmp_path / "out"), "regime": "task"}
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="the device cuda is not available here"):
            train(config_of(model_folder, device="cuda", **config))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="needs whole weights, which FSDP divides"):
        train(config_of(model_folder, lora_rank=2, device="cpu", **config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="2 GPUs in one process are not supported: start with"):
        train(config_of(model_folder, device="auto", **config))
