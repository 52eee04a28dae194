"""The geometry of the published checkpoints: public config values, and as they are but for the width."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerskip import LayerSkipModel
from layerskip.model import CheckpointSettings, families, load
from layerskip.model import checkpoint as published
from layerskip.model.checkpoint import PUBLISHED

_LLAMA2 = {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
_CODE = {"max_position_embeddings": 16_384, "rope_theta": 1_000_000.0}
_LLAMA3 = {
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "rope_theta": 500_000.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_LLAMA32_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CONFIGS = {  # of the base models that they were trained from
    "llama2-7B": _LLAMA2,
    "llama2-13B": _LLAMA2
    | {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40}
    | {"num_attention_heads": 40, "num_key_value_heads": 40},
    "llama2-70B": _LLAMA2
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "codellama-7B": _LLAMA2 | _CODE | {"vocab_size": 32_016},
    "codellama-34B": _LLAMA2
    | _CODE
    | {"hidden_size": 8192, "intermediate_size": 22_016, "num_hidden_layers": 48}
    | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "llama3-8B": _LLAMA2 | _LLAMA3 | {"intermediate_size": 14_336, "max_position_embeddings": 8192},
    "llama3.2-1B": _LLAMA2
    | _LLAMA3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"max_position_embeddings": 131_072, "tie_word_embeddings": True}
    | {"rope_scaling": _LLAMA32_ROPE},
}


def config_of(name, **changes):
    return AutoConfig.for_model("llama", **(CONFIGS[name] | changes))


def test_all_published_checkpoints_are_here():
    assert {f"facebook/layerskip-{name}" for name in CONFIGS} == set(PUBLISHED)


def test_config_is_understood_at_full_width():
    for name, public in CONFIGS.items():
        a = families.from_config(config_of(name).to_dict())
        assert a.n_layers == public["num_hidden_layers"]
        assert a.n_heads * a.head_dim == a.hidden_size == public["hidden_size"]
        assert a.head_dim == (64 if name == "llama3.2-1B" else 128)
        assert a.max_context == public["max_position_embeddings"]
        (rope,) = set(a.ropes)
        assert rope.theta == public["rope_theta"]
        assert (rope.kind, rope.factor) == (
            ("llama3", 32.0) if "rope_scaling" in public else ("default", 1.0)
        )


def test_known_exit_layers_are_inside_the_model():
    for name, public in CONFIGS.items():
        known = PUBLISHED[f"facebook/layerskip-{name}"]
        if known.exit_layer is not None:
            assert 1 <= known.exit_layer < public["num_hidden_layers"]
        assert known.draft_tokens is None or known.draft_tokens >= 1


@pytest.fixture
def folder(name, tmp_path):
    """A random checkpoint with all layers and heads, two dimensions a head."""
    heads = CONFIGS[name]["num_attention_heads"]
    config = config_of(name, hidden_size=2 * heads, head_dim=2, intermediate_size=48, vocab_size=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, 0.1)
    model.eval().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["codellama-34B", "llama3.2-1B"])
def test_narrow_checkpoint_equals_transformers(name, folder):
    decoder = load(folder, dtype=torch.float32).decoder
    tokens = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    layers = CONFIGS[name]["num_hidden_layers"]
    found = decoder.logits(decoder.run(decoder.embed(tokens), 0, layers, decoder.new_cache(12)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found, model(tokens).logits, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama3.2-1B", "codellama-7B"])
def test_hub_id_brings_the_known_exit_layer(name, folder, monkeypatch):
    hub_id = f"facebook/layerskip-{name}"
    monkeypatch.setattr("layerskip.decoding.language_model.resolve", lambda *_: folder)
    model = LayerSkipModel.from_pretrained(hub_id, dtype="float32")
    known = PUBLISHED[hub_id]
    answer = model.generate([1, 5, 9], max_new_tokens=10, ignore_eos=True)
    assert answer.mode == ("n-gram" if known.exit_layer is None else "self-speculative")
    assert answer.exit_layer == known.exit_layer
    assert known.draft_tokens in (None, answer.draft_tokens)
    plain = model.generate([1, 5, 9], mode="plain", max_new_tokens=10, ignore_eos=True)
    assert answer.token_ids == plain.token_ids


def test_a_checkpoint_that_names_an_exit_layer_itself_is_left_alone():
    own = CheckpointSettings(exit_layer=5)
    assert published.with_defaults("facebook/layerskip-llama2-7B", own) == own
    assert published.with_defaults("somebody/else", CheckpointSettings()) == CheckpointSettings()
