"""The folder that a run leaves, in other programs."""

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import causal_lms
from layerskip import LayerSkipModel
from layerskip.errors import TrainingWarning
from layerskip.training import TrainConfig, train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def trained(model_folder, data_file, tmp_path):
    """The folder of a step of training, of a family."""

    def folder(family, changes=(), **settings):
        base = tmp_path / "base"
        shutil.copytree(model_folder, base, ignore=shutil.ignore_patterns("*.safetensors"))
        words = len(json.loads((base / "tokenizer.json").read_text())["model"]["vocab"])
        causal_lms.build(family, vocab_size=words, **dict(changes)).save_pretrained(base)
        settings = {"max_steps": 1, "batch_size": 2, "fixed_exits": [2], "device": "cpu"} | settings
        files = {"model": str(base), "data": data_file, "output": str(tmp_path / "out")}
        return train(TrainConfig.from_mapping({"regime": "task", **files, **settings})).output

    return folder


def answers_in_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("3 plus 4 is", return_tensors="pt", return_token_type_ids=False)
    return model.generate(**inputs, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2"])
def test_transformers_answers_with_a_model_that_it_cannot_draft_with(family, trained):
    """It names fewer layers in the config, and these models run all of them."""
    changes = {"num_key_value_heads": 4}  # GPT-NeoX has as many as heads
    if family == "gpt2":
        with pytest.warns(TrainingWarning, match="nothing will draft with the result: .* of gpt2,"):
            folder = trained(family, changes)
    else:
        folder = trained(family, changes)
    answers_in_transformers(folder)
    fields = json.loads((folder / "generation_config.json").read_text())
    assert "assistant_early_exit" not in fields
    assert fields["layerskip"]["exit_layer"] == 2
    if family == "gpt_neox":
        assert LayerSkipModel.from_pretrained(folder, dtype="float32").settings.exit_layer == 2


def test_older_programs_read_the_rotary_base(trained):
    rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
    folder = trained("llama", {"rope_parameters": rope})
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 2.0}
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    assert fields["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert fields["chat_template"] == (folder / "chat_template.jinja").read_text()
