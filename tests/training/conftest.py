"""A tiny model with a tokenizer of its own, and rows to train on."""

import itertools
import json

import pytest
import torch

from layerskip.training import LayerSkipTrainer, TrainConfig, train
from layerskip.training import run as training_run


def make_model(folder, layers=4, tied=False):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *map(str, range(40)), "plus", "is", "user", "model"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} </s> {% endfor %}"
        "{% if add_generation_prompt %}model {% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Draw no pictures of runs, which take longer than most runs here; returns what draws them."""
    plot_run = training_run.plot_run
    monkeypatch.setattr(training_run, "plot_run", lambda *_: [])
    return plot_run


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return str(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="session")
def tied_model_folder(tmp_path_factory):
    """The same whose head is its embedding."""
    return str(make_model(tmp_path_factory.mktemp("tied"), tied=True))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {"prompt": f"{a} plus {b} is " * (1 + a % 3), "completion": f"{a + b}"}
        for a in range(10)
        for b in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(model_folder, data_file, tmp_path):
    return {
        "model": model_folder,
        "data": data_file,
        "output": str(tmp_path / "out"),
        "regime": "task",
        "p_max": 0.3,
        "batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "log_steps": 2,
        "save_steps": 2,
        "device": "cpu",
    }


@pytest.fixture
def interrupted(monkeypatch):
    """Runs that end with an exception in their n-th forward pass."""

    def interrupt(settings, forward_passes, **changes):
        plain, count = LayerSkipTrainer.training_step, itertools.count(1)

        def until(self, *args, **kwargs):
            if next(count) == forward_passes:
                raise KeyboardInterrupt
            return plain(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(LayerSkipTrainer, "training_step", until)
            with pytest.raises(KeyboardInterrupt):
                train(TrainConfig.from_mapping({**settings, **changes}))

    return interrupt
