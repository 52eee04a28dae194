"""Fields under the names that transformers had before version 5: it reads the same out of both."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_checkpoint
import tiny_models
from layerskip.fileio import share_weights
from layerskip.model import tokenizer
from layerskip.model import tokenizer as older_names

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize("case", ["llama3.1", "gemma3", "phi4-mini", "gpt-neox"])
def test_transformers_reads_the_same_model(case, tmp_path):
    model = tiny_models.reference(case)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    older = older_names.of_config(config)
    assert older["torch_dtype"] == "float32"
    file.write_text(json.dumps(config | older))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _without_type(again.config.rope_parameters) == model.config.rope_parameters
    tokens = tiny_models.token_ids(case, 1, 40)
    again.set_attn_implementation("eager")
    found = tiny_models.reference_logits(again, tokens)
    assert torch.equal(found, tiny_models.reference_logits(model, tokens))


def _without_type(rope):
    inner = {k: _without_type(v) if isinstance(v, dict) else v for k, v in rope.items()}
    return {k: v for k, v in inner.items() if k != "type"}


def test_the_names_of_each_family():
    def older(model_type, rope, **others):
        config = {"model_type": model_type, "rope_parameters": rope, **others}
        return older_names.of_config(config)

    plain = {"rope_type": "default", "rope_theta": 1e5}
    assert older("llama", plain) == {"rope_theta": 1e5}
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    of_both = {"rope_theta": 5e5, "rope_scaling": scaling | {"type": "llama3"}}
    assert older("llama", LLAMA3) == of_both
    part = {**plain, "partial_rotary_factor": 0.5}
    assert older("glm", part) == {"rope_theta": 1e5, "partial_rotary_factor": 0.5}
    assert older("gpt_neox", part) == {"rotary_emb_base": 1e5, "rotary_pct": 0.5}
    two = {"sliding_attention": plain, "full_attention": LLAMA3}
    assert older("gemma3_text", two) == of_both | {"rope_local_base_freq": 1e5}
    assert older("modernbert-decoder", two) == {}  # others called theirs otherwise
    assert older("gpt2", None) == {}
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [2.0]}
    found = older("phi3", long, original_max_position_embeddings=64)
    # Version 4 refuses more than these three.
    assert found["rope_scaling"] == {
        "type": "longrope",
        "short_factor": [1.0],
        "long_factor": [2.0],
    }


@pytest.fixture
def folder(tmp_path):
    """A checkpoint whose tokenizer has templates by name, as transformers 5 writes it."""
    source = tiny_checkpoint.save(tmp_path / "model")
    wrapped = AutoTokenizer.from_pretrained(source)
    wrapped.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    wrapped.add_special_tokens({"extra_special_tokens": ["<more>"]})
    wrapped.save_pretrained(source)
    return source


def test_templates_with_a_name_are_copied_and_stand_in_the_config_too(folder, tmp_path):
    (tmp_path / "copy").mkdir()
    tokenizer.write(folder, tmp_path / "copy")
    named = "additional_chat_templates/tool_use.jinja"
    assert (tmp_path / "copy" / named).read_text() == "{{ 2 }}"
    fields = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["additional_special_tokens"] == ["<more>"]
    assert fields["chat_template"] == [
        {"name": "default", "template": "{{ 1 }}"},
        {"name": "tool_use", "template": "{{ 2 }}"},
    ]
    before, again = (AutoTokenizer.from_pretrained(path) for path in (folder, tmp_path / "copy"))
    assert again.chat_template == before.chat_template
    assert again.encode("a<more>b") == before.encode("a<more>b")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_weights_may_be_read_by_those_who_read_the_json(tmp_path):
    (tmp_path / "adapter").mkdir()
    for folder, mode in ((tmp_path, 0o644), (tmp_path / "adapter", 0o640)):
        for name, own in (("x.json", mode), ("model.safetensors", 0o600)):
            (folder / name).touch()
            (folder / name).chmod(own)
    share_weights(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "adapter" / "model.safetensors").stat().st_mode & 0o777 == 0o640
