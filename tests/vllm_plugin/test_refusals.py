"""Refusal of unsupported settings in one line, if possible before a model is loaded."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest

LAYERSKIP = {"method": "layerskip"}


@pytest.fixture
def configure(tiny, engine_options):
    """Create the configuration of a run, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    def configure(speculative=LAYERSKIP, model=tiny, **options):
        arguments = {"model": str(model)} | engine_options | options
        return EngineArgs(**arguments, speculative_config=speculative).create_engine_config()

    return configure


def test_configuration_carries_the_exit_layer(configure):
    config = configure(additional_config={"other": 1})
    assert config.additional_config == {
        "other": 1,
        "layerskip": {"exit_layer": 2, "draft_vocab_size": None},
    }
    assert config.speculative_config.method == "draft_model"
    assert config.speculative_config.num_speculative_tokens == 4


def test_spec_tokens_flag(configure):
    assert configure(spec_tokens=3).speculative_config.num_speculative_tokens == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 2}, "no pipeline parallelism"),
        ({"enable_lora": True}, "no LoRA"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "no KV connector",
        ),
        (
            {"speculative": LAYERSKIP | {"exit_layer": 6}},
            "exit_layer must be in 1..5 for this model",
        ),
        ({"speculative": LAYERSKIP | {"exit_layer": 0}}, "exit_layer must be a positive integer"),
        ({"speculative": LAYERSKIP | {"exit_layer": "4"}}, "exit_layer must be a positive integer"),
        (
            {"speculative": LAYERSKIP | {"num_speculative_tokens": 0}},
            "num_speculative_tokens must be a positive integer",
        ),
        (
            {"speculative": LAYERSKIP | {"draft_vocab_size": -1}},
            "draft_vocab_size must be a number of tokens",
        ),
        (
            {"speculative": LAYERSKIP | {"model": "another"}},
            "unknown settings in speculative_config: model",
        ),
    ],
)
def test_refused_before_loading(configure, options, message):
    with pytest.raises(ValueError, match=f"layerskip: {re.escape(message)}") as refusal:
        configure(**options)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0"])
def test_versions_outside_the_tested_range(configure, monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(
        ValueError, match=rf"vLLM {version} is outside the tested range >=0.32,<0.34"
    ):
        configure()


def test_checkpoint_without_an_exit_layer(configure, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    with pytest.raises(ValueError, match="has no assistant_early_exit: give exit_layer"):
        configure(model=folder)
    given = LAYERSKIP | {"exit_layer": 2, "num_speculative_tokens": 1}
    assert configure(given, folder).additional_config["layerskip"]["exit_layer"] == 2


def test_v2_model_runner_is_not_taken(configure, monkeypatch):
    config = configure()
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    assert not config.use_v2_model_runner
    assert configure(None).use_v2_model_runner
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="does not yet support: speculative method 'layerskip'"):
        configure()


def test_exit_behind_layers_of_different_attention():
    from layerskip.vllm_plugin.proposer import LayerSkipProposer

    proposer = object.__new__(LayerSkipProposer)
    proposer.exit_layer = 2
    proposer._draft_attn_layer_names = {"layers.0", "layers.1"}
    groups = [SimpleNamespace(layer_names=["layers.0"]), SimpleNamespace(layer_names=["layers.1"])]
    with pytest.raises(ValueError, match="the first 2 layers are in several KV cache groups"):
        proposer.validate_same_kv_cache_group(SimpleNamespace(kv_cache_groups=groups))


def test_models_of_another_structure():
    from torch import nn

    from layerskip.vllm_plugin.early_exit import decoder_of

    class Decoder(nn.Module):
        layers = start_layer = end_layer = norm = None

        def forward(self):
            return self.layers

    with pytest.raises(ValueError, match="Linear is not supported: its `model` lacks"):
        decoder_of(nn.Linear(1, 1))
    model = nn.Module()
    model.model = Decoder()
    with pytest.raises(ValueError, match="its forward pass does not end at `end_layer`"):
        decoder_of(model)
