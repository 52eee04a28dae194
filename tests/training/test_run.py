import importlib.util
import itertools
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf_files
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

import causal_lms
import tiny_models
from layerskip import LayerSkipModel
from layerskip.errors import NonFiniteLossError, TrainingWarning, UnwrittenCheckpointError
from layerskip.training import LayerSkipTrainer, TrainConfig, train
from layerskip.training.callbacks import read_log
from layerskip.training.checkpointing import last_checkpoint
from layerskip.training.data import LeftOutWarning
from layerskip.training.loading import _matmul_s, arithmetic, load_model, pretrained_model
from layerskip.training.run import check_layers

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


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


def run(settings, **changes):
    return train(TrainConfig.from_mapping({**settings, **changes}))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_what_labels_repeat_is_kept_where_that_is_asked_for(settings, tmp_path):
    rows = [{"prompt": f"{i} plus 1 is", "completion": f" more than {i} , I say"} for i in range(9)]
    data = tmp_path / "alike.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(settings, data=str(data), keep_draft_text=True, max_steps=1)
    model = LayerSkipModel.from_pretrained(result.output, dtype="float32")
    assert model.settings.draft_text[-1] == model.tokenizer.eos_token_id  # whole rows
    assert model.answer("3 plus").plan.draft_text == model.settings.draft_text


def test_the_result_is_an_ordinary_checkpoint(settings):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(settings, eval_rows=10, fixed_exits=[2], accumulation=2, draft_tokens=7)
    assert (result.steps, result.exit_layer) == (6, 2)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    generation = json.loads((result.output / "generation_config.json").read_text())
    assert generation["assistant_early_exit"] == 2
    assert generation["num_assistant_tokens"] == 7
    assert model.generation_config.assistant_early_exit == 2
    assert model.generation_config.layerskip == generation["layerskip"]
    assert "draft_text" not in generation["layerskip"]  # rows stay where they are unless asked for
    inputs = tokenizer("3 plus 4 is", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1
    logs = read_log(result.output / "train_log.jsonl")
    training = next(log for log in logs if "loss" in log)
    assert {"loss_exit_2", "accuracy_exit_4", "tokens_per_s", "skip_rate_last", "step"} <= {
        *training
    }
    assert result.metrics["eval_loss"] == result.metrics["eval_loss_exit_4"]
    assert 0 <= result.metrics["eval_accuracy_exit_1"] <= 1
    assert (result.output / "loss_per_exit.png").exists()
    assert (result.output / "accuracy_over_layers.png").exists()
    assert not (result.output / ".incomplete").exists()
    settings_used = json.loads((result.output / "train.json").read_text())
    assert TrainConfig.from_mapping(settings_used).effective_recipe.fixed_exits == (2,)


def test_a_package_that_is_missing_is_named_with_what_brings_it(settings, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name)
    )
    with pytest.raises(ImportError, match=r"needs datasets; run: pip install 'layerskip\[train\]'"):
        run(settings)
    assert not Path(settings["output"]).exists()


def test_training_learns(settings):
    result = run(settings, max_steps=60, log_steps=10, save_steps=100, curriculum="all", p_max=0.1)
    losses = [log for log in read_log(result.output / "train_log.jsonl") if "loss" in log]
    for exit_layer in (2, 4):
        name = f"loss_exit_{exit_layer}"
        assert losses[-1][name] < 0.85 * losses[0][name]


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
                run(settings, **changes)

    return interrupt


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulation": 2}, {"packing": True, "max_length": 24}, {"lora_rank": 2}],
)
def test_resume_is_bit_for_bit(settings, tmp_path, interrupted, changes):
    changes = {**changes, "max_steps": 40, "save_steps": 15, "keep_checkpoints": 9}
    whole = run(settings, **changes)
    half = tmp_path / "half"
    interrupted(settings, 40, **changes, output=str(half))
    assert last_checkpoint(half).endswith("checkpoint-15" if "accumulation" in changes else "-30")
    resumed = run(settings, **changes, output=str(half), resume=True)
    assert resumed.steps == 40
    assert_same_weights(whole.output, half)
    steps = [log["step"] for log in read_log(half / "train_log.jsonl") if "loss" in log]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_resumed_as_well(settings, model_folder, tmp_path, interrupted, family):
    """A checkpoint has each by itself, the model has them together."""
    folder = tmp_path / "mixture"
    shutil.copytree(
        model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config*")
    )
    shutil.copy(Path(model_folder) / "tokenizer_config.json", folder)
    vocabulary = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    causal_lms.build(family, vocab_size=vocabulary).save_pretrained(folder)
    changes = {"model": str(folder), "max_steps": 12, "save_steps": 5}
    whole = run(settings, **changes)
    half = tmp_path / "half"
    interrupted(settings, 8, **changes, output=str(half))
    run(settings, **changes, output=str(half), resume=True)
    assert_same_weights(whole.output, half)


def test_a_resume_saves_as_often_as_it_is_told_to(settings, interrupted):
    interrupted(settings, 4, max_steps=8, save_steps=3, keep_checkpoints=9)
    run(settings, max_steps=8, save_steps=2, keep_checkpoints=9, resume=True)
    found = Path(settings["output"]).glob("checkpoint-*")
    assert {path.name for path in found} == {f"checkpoint-{step}" for step in (3, 4, 6, 8)}


def test_a_resume_goes_on_with_the_learning_rate_and_weight_decay_of_now(
    settings, interrupted, monkeypatch
):
    changes = {"scheduler": "linear", "log_steps": 1, "max_steps": 8, "weight_decay": 0.1}
    interrupted(settings, 6, **changes)
    seen = []

    def watched(self, *args, **kwargs):
        seen.append([group["weight_decay"] for group in self.optimizer.param_groups])
        return plain(self, *args, **kwargs)

    plain = LayerSkipTrainer.training_step
    monkeypatch.setattr(LayerSkipTrainer, "training_step", watched)
    run(settings, **{**changes, "learning_rate": 1e-4, "weight_decay": 0.2}, resume=True)
    log = read_log(Path(settings["output"]) / "train_log.jsonl")
    rates = [line["learning_rate"] for line in log if "loss" in line]
    shares = [1 - step / 8 for step in range(8)]
    assert rates == pytest.approx([1e-3 * s for s in shares[:4]] + [1e-4 * s for s in shares[4:]])
    assert seen == [[0.2, 0.0]] * 4


@pytest.mark.parametrize("length", [{"max_steps": 6}, {"epochs": 1.0}])
def test_a_run_that_was_killed_while_its_result_was_written(settings, tmp_path, length):
    changes = {"scheduler": "constant", "save_steps": 2, "max_steps": None, **length}
    whole = run(settings, **changes)
    before = tmp_path / "before"
    shutil.copytree(whole.output, before)
    (whole.output / "model.safetensors").unlink()
    resumed = run(settings, **changes, resume=True)
    assert resumed.steps == whole.steps
    assert_same_weights(before, whole.output)
    for name in ("config.json", "generation_config.json"):
        assert (before / name).read_text() == (whole.output / name).read_text()


def test_a_run_that_had_ended_has_the_tokenizers_end_token_all_the_same(settings, tmp_path):
    model = shutil.copytree(settings["model"], tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**fields, "eos_token_id": 3}))
    changes = {"max_steps": 2, "save_steps": 2, "model": str(model)}
    first = run(settings, **changes)
    (first.output / "model.safetensors").unlink()
    before = (first.output / "config.json").read_text()
    again = run(settings, **changes, resume=True)
    assert (again.output / "config.json").read_text() == before
    assert json.loads(before)["eos_token_id"] == 2


def test_nothing_of_the_configuration_is_changed_by_training(settings):
    before = json.loads(Path(settings["model"], "config.json").read_text())
    after = json.loads((run(settings, max_steps=1).output / "config.json").read_text())
    for name in ("use_cache", "eos_token_id", "bos_token_id", "num_hidden_layers"):
        assert after.get(name) == before.get(name), name


def test_rows_that_are_longer_than_the_model_knows_are_refused(settings, tmp_path):
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"text": "1 plus " * 60}) + "\n")
    with pytest.raises(ValueError, match="a row has 121 tokens, but this model knows 64 positions"):
        run(settings, data=str(rows))
    packed = [{"text": "1 plus " * 20}] * 9
    rows.write_text("".join(json.dumps(row) + "\n" for row in packed))
    assert run(settings, data=str(rows), packing=True, max_length=200, max_steps=1).steps == 1


def test_half_an_epoch_goes_on_to_a_whole_one(settings):
    half = run(settings, max_steps=None, epochs=0.5)
    whole = run(settings, max_steps=None, epochs=1.0, resume=True)
    assert (half.steps, whole.steps) == (13, 25)


def test_the_curriculum_goes_on_after_a_resume(settings, tmp_path, interrupted):
    changes = {"curriculum": "rotational", "rotation": 3, "log_steps": 1, "max_steps": 7}
    whole = run(settings, **changes)
    half = tmp_path / "half"
    interrupted(settings, 4, **changes, output=str(half))
    run(settings, **changes, output=str(half), resume=True)
    exits = [
        [name for name in log if name.startswith("loss_exit")]
        for folder in (whole.output, half)
        for log in read_log(folder / "train_log.jsonl")
        if "loss" in log
    ]
    assert exits[:7] == exits[7:]
    assert len({*map(tuple, exits)}) == 3


def test_skip_rates_of_all_layers_are_in_the_log(settings):
    result = run(settings, max_steps=2, log_steps=1, p_max=0.3)
    log = next(log for log in read_log(result.output / "train_log.jsonl") if "loss" in log)
    assert log["skip_rates"] == pytest.approx([0.0, 0.077976, 0.17622, 0.3], abs=1e-6)
    assert log["skip_rate_last"] == 0.3


def test_progress_is_told_and_nothing_is_printed(settings, capfd):
    from datasets import are_progress_bars_disabled
    from transformers.utils import logging

    before = (logging.is_progress_bar_enabled(), are_progress_bars_disabled())
    told = []
    train(TrainConfig.from_mapping({**settings, "eval_rows": 8}), told.append)
    assert [report.step for report in told if not report.logs] == [*range(7)]
    assert {report.total_steps for report in told} == {6}
    assert [report.step for report in told if "loss" in report.logs] == [2, 4, 6]
    assert "eval_loss" in told[-1].logs
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as here: sums depend on how many there are
_SCRIPT = """
import json, sys
from layerskip.training import TrainConfig, train
train(TrainConfig.from_mapping(json.loads(sys.argv[1])))
"""


def test_killed_runs_resume_bit_for_bit(settings, tmp_path):
    changed = {"max_steps": 200, "save_steps": 500, "keep_checkpoints": 2}
    whole = run(settings, **changed)
    out = tmp_path / "killed"
    arguments = json.dumps({**settings, **changed, "save_steps": 1, "output": str(out)})
    process = subprocess.Popen([sys.executable, "-c", _SCRIPT, arguments], env=ONE_THREAD)
    try:
        while last_checkpoint(out) is None and process.poll() is None:
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert 0 < int(last_checkpoint(out).rsplit("-", 1)[1]) < 200
    run(settings, **changed, output=str(out), resume=True)
    assert_same_weights(whole.output, out)


_KILLED = """
import os, signal, torch
plain = torch.save
def cut(values, path, *args, **kwargs):
    plain(values, path, *args, **kwargs)
    if "checkpoint-3" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = cut
"""


def test_a_run_that_is_killed_in_the_middle_of_a_checkpoint(settings, tmp_path):
    whole = run(settings, save_steps=1)
    out = tmp_path / "killed"
    arguments = json.dumps({**settings, "save_steps": 1, "output": str(out)})
    command = [sys.executable, "-c", _KILLED + _SCRIPT, arguments]
    done = subprocess.run(command, check=False, env=ONE_THREAD)
    assert done.returncode == -signal.SIGKILL
    assert (out / ".incomplete" / "checkpoint-3").is_dir()
    assert last_checkpoint(out).endswith("checkpoint-2")
    run(settings, save_steps=5, output=str(out), resume=True)
    assert_same_weights(whole.output, out)
    assert not (out / "checkpoint-3").exists()
    assert not (out / ".incomplete").exists()


def test_a_full_disk_loses_nothing(settings, monkeypatch):
    out = Path(settings["output"])
    plain = torch.save

    def full(values, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        return plain(values, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UnwrittenCheckpointError, match=r"step 4 .*No space left.*checkpoint-2"):
        run(settings)
    assert last_checkpoint(out).endswith("checkpoint-2")
    assert not (out / ".incomplete").exists()


def test_a_loss_that_is_not_finite_stops_training(settings):
    """Step 1 has no learning rate yet, and step 2 ruins the weights."""
    what = r"at step 3; .* is \S+checkpoint-1 \(checkpoint-2 may have been bad already: remove it"
    how = {"max_grad_norm": 0, "warmup_steps": 2, "max_steps": 50, "save_steps": 1}
    with pytest.raises(NonFiniteLossError, match=what):
        run(settings, learning_rate=1e30, **how)
    shutil.rmtree(Path(settings["output"], "checkpoint-2"))
    assert run(settings, learning_rate=1e-3, **how | {"max_steps": 4}, resume=True).steps == 4


def test_a_good_checkpoint_stays_where_only_one_is_kept(settings):
    """What the weights of the newest are worth the next step shows, so the one before goes after it."""
    how = {"max_grad_norm": 0, "warmup_steps": 2, "save_steps": 1, "keep_checkpoints": 1}
    with pytest.raises(
        NonFiniteLossError, match=r"is \S+checkpoint-1 \(checkpoint-2 may have been"
    ):
        run(settings, learning_rate=1e30, max_steps=50, **how)
    left = sorted(path.name for path in Path(settings["output"]).glob("checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-2"]
    shutil.rmtree(settings["output"])
    run(settings, max_steps=4, **how)
    left = [path.name for path in Path(settings["output"]).glob("checkpoint-*")]
    assert left == ["checkpoint-4"]


def test_lora_is_merged_and_kept_beside(settings, model_folder):
    import peft
    from transformers import AutoModelForCausalLM

    result = run(settings, lora_rank=4)
    assert (result.output / "adapter" / "adapter_model.safetensors").exists()
    trained, before = weights(result.output), weights(model_folder)
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    merged = AutoModelForCausalLM.from_pretrained(result.output)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    both = peft.PeftModel.from_pretrained(base, result.output / "adapter")
    tokens = torch.arange(4, 20)[None]
    torch.testing.assert_close(merged(tokens).logits, both(tokens).logits, rtol=1e-5, atol=1e-6)


def test_weights_under_an_adapter_stay_in_the_16_bits_they_have(settings, model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model_folder).bfloat16()
    shutil.copytree(model_folder, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    changes = {"model": str(tmp_path / "base"), "lora_rank": 4}
    in_float32 = weights(run(settings, **changes, output=str(tmp_path / "float32")).output)
    assert {w.dtype for w in in_float32.values()} == {torch.float32}

    folder = run(settings, **changes, precision="bfloat16", packing=True, max_length=24).output
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in adapter.values()} == {torch.float32}
    trained, before = weights(folder), weights(tmp_path / "base")
    assert {w.dtype for w in trained.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in trained.items():
        a, b = (adapter.get(f"base_model.model.{name[:-7]}.lora_{x}.weight") for x in "AB")
        change = 2 * (b @ a) if a is not None else 0  # the default scale is twice the rank
        exactly = before[name].float() + change
        assert (weight - exactly).abs().le(exactly.abs() * 2**-8 + 1e-9).all()  # rounded once
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_tensorboard_is_told_of_every_exit(settings):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = run(settings, fixed_exits=[2], curriculum="none")
    [written] = (result.output / "runs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(written)).Reload()
    logs = [log for log in read_log(result.output / "train_log.jsonl") if "loss" in log]
    for name in ("loss", "loss_exit_2", "accuracy_exit_4"):
        told = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert told == pytest.approx({log["step"]: log[name] for log in logs})


def test_from_scratch_and_gradient_checkpointing(settings, model_folder):
    how = {"regime": "pretrain", "rotation": 3, "gradient_checkpointing": True}
    result = run(settings, from_scratch=True, seed=5, learning_rate=1e-9, **how)
    made, before = weights(result.output), weights(model_folder)
    assert made.keys() == before.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert (made[name] - before[name]).abs().max() > 1e-2


def test_a_line_of_the_log_that_a_crash_cut_off_is_left_out(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_log(file) == [{"step": 1}]


def test_seeds_repeat_a_run(settings, tmp_path):
    first = run(settings)
    second = run(settings, output=str(tmp_path / "second"))
    other = run(settings, output=str(tmp_path / "other"), seed=1)
    assert_same_weights(first.output, second.output)
    with pytest.raises(AssertionError):
        assert_same_weights(first.output, other.output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "none.jsonl"}, "none.jsonl does not exist"),
        ({"model": "/nowhere/at/all"}, "no tokenizer in /nowhere/at/all"),
        ({"fixed_exits": [9]}, "fixed_exits names"),
        ({"curriculum": "rotational", "rotation": 9}, "rotation is 9"),
        ({"exit_layer": 4}, "exit_layer is 4; it must be 1 to 3"),
        ({"eval_rows": 100}, "eval_rows is 100, but there are 100 rows"),
        ({"eval_exits": [9], "eval_rows": 4}, r"eval_exits names \[9\]"),
        ({"eval_exits": [2]}, "eval_exits needs rows to evaluate on"),
        ({"eval_steps": 2}, "eval_steps needs rows to evaluate on"),
        ({"scheduler": "greedy"}, "there is no scheduler 'greedy'"),
        ({"scheduler": "reduce_lr_on_plateau"}, "there is no scheduler"),
        ({"eval_data": "none.jsonl"}, "none.jsonl does not exist"),
        ({"scheduler": "cosin"}, "there is no scheduler 'cosin'; there are: linear"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"max_length": 2}, "no row of .* has a label within max_length = 2"),
        ({"fixed_exits": [1], "exit_weighting": "paper"}, "fixed_exits names 1, whose weight is 0"),
        ({"eval_split": "test"}, "eval_split needs eval_data"),
        ({"split": "validation"}, "split is for data sets of the hub; .* is a file"),
        ({"exits": [1], "curriculum": "all", "fixed_exits": []}, "no exit before the last layer"),
        ({"exits": [4], "curriculum": "all", "fixed_exits": []}, "no exit before the last layer"),
        ({"data_config": "main"}, "data_config is for data sets of the hub; .* is a file"),
        ({"completion": "{answer}"}, r"sums.jsonl:1 has the fields \['completion', 'prompt'\]"),
    ],
)
def test_bad_input_is_one_line_before_training(settings, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        run(settings, **changes)
    assert "\n" not in str(error.value)
    assert last_checkpoint(settings["output"]) is None


@pytest.mark.parametrize(
    ("changes", "content", "message"),
    [
        ({"completion": "{answer}"}, None, "sums.jsonl:1 has the fields"),
        ({}, "", "rows.jsonl has no rows"),
        ({"eval_data": "held-out.jsonl"}, None, "held-out.jsonl has no rows"),
    ],
)
def test_rows_that_cannot_be_are_said_before_weights_are_loaded(
    settings, changes, content, message, tmp_path, monkeypatch
):
    monkeypatch.delattr("layerskip.training.run.load_model")
    monkeypatch.chdir(tmp_path)
    Path("held-out.jsonl").touch()
    if content is not None:
        Path("rows.jsonl").write_text(content)
        changes = {**changes, "data": "rows.jsonl"}
    with pytest.raises(ValueError, match=message):
        run(settings, **changes)


def test_threads_are_set(settings):
    before = torch.get_num_threads()
    try:
        run(settings, threads=before + 1, max_steps=1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_the_last_steps_are_logged_too(settings):
    result = run(settings, max_steps=5, log_steps=3)
    logs = read_log(result.output / "train_log.jsonl")
    assert [log["step"] for log in logs if "loss" in log] == [3, 5]


def test_the_exit_that_will_draft_is_evaluated(settings):
    result = run(settings, eval_rows=4, exit_layer=2, fixed_exits=[2], curriculum="none")
    assert "eval_loss_exit_2" in result.metrics


@pytest.mark.parametrize(("batch_size", "kind"), [(4, "eager"), (10_000, "sdpa")])
def test_attention_keeps_its_weights_where_they_are_few(settings, batch_size, kind):
    config = TrainConfig.from_mapping({**settings, "max_length": 128, "batch_size": batch_size})
    assert load_model(config).config._attn_implementation == kind


def test_what_does_not_fit_is_said_before_the_rows_are_read(settings, monkeypatch):
    def refuse(*_):
        raise ValueError("this model's layers do not work so")

    def encode_rows(*_, **__):
        raise AssertionError

    monkeypatch.setattr("layerskip.training.run.encode_rows", encode_rows)
    for part, changes in (
        ("attach", {}),
        ("with_adapter", {"lora_rank": 2}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"layerskip.training.run.{part}", refuse)
            with pytest.raises(ValueError, match="layers do not work so"):
                run(settings, **changes)
    with pytest.raises(ValueError, match=r"held_out\.jsonl does not exist"):
        run(settings, eval_data="held_out.jsonl")


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux tells what is open")
def test_rows_that_are_never_wanted_leave_no_file_open(settings, monkeypatch):
    def refuse(*_):
        raise ValueError("this model's layers do not work so")

    monkeypatch.setattr("layerskip.training.run.attach", refuse)
    with pytest.raises(ValueError, match="layers do not work so") as caught:
        run(settings)
    fds = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    opened = {os.path.realpath(fd) for fd in fds}
    assert os.path.realpath(settings["data"]) not in opened
    assert caught.value.__traceback__  # whose frames hold on to the rows


def test_rows_to_evaluate_on_are_looked_at_first(settings, tmp_path):
    """They are the fewer: what is wrong with them is said before the others take long."""
    for name in ("train", "held_out"):
        rows = {"prompt": "1 + 1", "completion": " 2"}, {"question": "1 + 1"}
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "held_out.jsonl")}
    with pytest.raises(ValueError, match=r"held_out\.jsonl:2"):
        run(settings, **files)


def test_a_full_disk_at_the_tokenizer_loses_nothing(settings, monkeypatch):
    """Its library raises a bare Exception."""
    folder = Path(settings["output"])
    plain = PreTrainedTokenizerFast.save_pretrained

    def full_at(name):
        def save(self, where, *args, **kwargs):
            if Path(where).name == name:
                raise Exception("No space left on device\n(os error 28)")
            return plain(self, where, *args, **kwargs)

        return save

    for name, message in (
        ("checkpoint-4", "the checkpoint of step 4"),
        (".incomplete", "the result of step 6"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_at(name))
            with pytest.raises(UnwrittenCheckpointError) as error:
                run(settings, resume=folder.exists())
        assert str(error.value).startswith(f"{message} could not be written to {folder} (No space")
        assert f"good checkpoint is {last_checkpoint(folder)}. Make room" in str(error.value)
        assert "\n" not in str(error.value)
        assert not (folder / ".incomplete").exists()
    assert run(settings, resume=True).steps == 6


def test_a_result_that_cannot_be_written_leaves_the_checkpoint(settings, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("layerskip.training.run.flush", full)
        with pytest.raises(UnwrittenCheckpointError, match=r"No space left.*go on with --resume"):
            run(settings, max_steps=4)
    assert last_checkpoint(settings["output"]).endswith("checkpoint-4")
    assert run(settings, max_steps=4, resume=True).steps == 4


def test_weights_come_to_the_result_last(settings, monkeypatch):
    """Killed in between, a folder must not look like a checkpoint that lacks its tokenizer."""
    move = Path.replace

    def fails(path, target):
        if path.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        return move(path, target)

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(UnwrittenCheckpointError):
        run(settings, max_steps=2)
    assert not list(Path(settings["output"]).glob("*.safetensors"))
    monkeypatch.undo()
    assert run(settings, max_steps=2, resume=True).steps == 2
    assert (Path(settings["output"]) / "model.safetensors").exists()


@pytest.fixture
def prepared(settings, monkeypatch):
    """The trainer that settings make, before it trains."""

    def trainer_of(**changes):
        seen = []

        def train(self, **_):
            seen.append(self)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LayerSkipTrainer, "train", train)
            with pytest.raises(KeyboardInterrupt):
                run(settings, **changes)
        return seen[0]

    return trainer_of


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"precision": "bfloat16"}, "args.bf16", True),
        ({"weight_decay": 0.1}, "args.weight_decay", 0.1),
        ({"gradient_checkpointing": True}, "args.gradient_checkpointing", True),
        ({"compile": True}, "args.torch_compile", True),
        ({"eval_exits": [2], "eval_rows": 4}, "eval_exits", (2,)),
        ({"max_grad_norm": 0.5}, "args.max_grad_norm", 0.5),
        ({"lora_rank": 4}, "model.peft_config", {"default": (4, 8)}),
        ({"lora_rank": 4, "lora_alpha": 3}, "model.peft_config", {"default": (4, 3)}),
    ],
)
def test_settings_reach_the_trainer(prepared, changes, name, value):
    found = operator.attrgetter(name)(prepared(**changes))
    if name == "model.peft_config":
        found = {adapter: (config.r, config.lora_alpha) for adapter, config in found.items()}
    assert found == value


@pytest.mark.parametrize(
    ("capability", "bfloat16_s", "is_fast"),
    [("AVX512", 1.0, True), ("AVX512", 3.0, False), ("AVX2", 1.0, False)],
)
def test_bfloat16_is_for_cpus_that_are_fast_at_it(
    prepared, monkeypatch, capability, bfloat16_s, is_fast
):
    seconds = {torch.bfloat16: bfloat16_s, torch.float32: 2.0}
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("layerskip.training.loading._matmul_s", seconds.__getitem__)
    assert prepared(precision="auto").args.bf16 is is_fast


def test_the_faster_precision_is_timed():
    """Whichever it is here: `auto` names the type whose products took less time."""
    faster = min(torch.bfloat16, torch.float32, key=_matmul_s)
    config = TrainConfig(model="m", data="d", output="o", precision="auto", device="cpu")
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        assert arithmetic(config) == faster
    assert 0 < _matmul_s(torch.float32) < 60


def test_settings_reach_the_rows(prepared, settings, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    data = tmp_path / "rows.jsonl"
    fields = {"data": str(data), "prompt": "user {a} is", "completion": "{b}"}
    data.write_text('{"a": "1 plus 2", "b": "3"}\n' * 4)
    prompt, completion = tokenizer.encode("user 1 plus 2 is"), [*tokenizer.encode("3"), 2]
    [row, *_] = prepared(**fields).train_dataset
    assert row["input_ids"] == [*prompt, *completion]
    assert row["labels"] == [-100] * len(prompt) + completion
    [row, *_] = prepared(**fields, completion_only=False).train_dataset
    assert row["labels"][1:] == row["input_ids"][1:] == [*prompt, *completion][1:]
    with pytest.warns(LeftOutWarning, match="longer than max_length = 2 tokens"):
        [row, *_] = prepared(data=str(data), text_field="a", max_length=2).train_dataset
    assert row["input_ids"] == tokenizer.encode("1 plus")


def test_training_in_bfloat16(settings):
    """Without rows to evaluate on, too, there is a picture of the accuracy over the layers."""
    result = run(settings, max_steps=2, log_steps=1, precision="bfloat16")
    logs = [log for log in read_log(result.output / "train_log.jsonl") if "loss" in log]
    assert all(log["loss"] > 0 and log["peak_memory_bytes"] > 0 for log in logs)
    assert (result.output / "accuracy_over_layers.png").exists()


def test_an_earlier_run_is_not_overwritten(settings):
    run(settings)
    with pytest.raises(ValueError, match="checkpoints of an earlier run"):
        run(settings)


def test_a_finished_result_is_not_overwritten(settings):
    run(settings)
    for checkpoint in Path(settings["output"]).glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for resume in (False, True):
        with pytest.raises(ValueError, match="has a checkpoint, which training would replace"):
            run(settings, resume=resume)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
def test_what_needs_a_gpu_is_refused_without_one(settings):
    with pytest.raises(ValueError, match="float16 needs a GPU"):
        run(settings, precision="float16")
    with pytest.raises(ValueError, match="the device cuda is not available here; use auto or cpu"):
        run(settings, device="cuda")


def test_a_full_disk_at_the_log_names_the_step(settings, monkeypatch):
    def full(path, flags):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layerskip.training.callbacks._open_no_link", full)
    with pytest.raises(
        UnwrittenCheckpointError, match=r"log of step 3 .*checkpoint-2\. .*go on with --resume"
    ):
        run(settings, log_steps=3)


def test_the_last_evaluation_is_made_once(settings):
    run(settings, eval_rows=8, eval_steps=3)
    log = read_log(Path(settings["output"]) / "train_log.jsonl")
    assert [line["step"] for line in log if "eval_loss" in line] == [3, 6]


def test_a_rate_that_does_not_come_to_its_peak_is_said(settings):
    with pytest.warns(TrainingWarning, match="warmup_steps is 6, but there are 6 steps"):
        run(settings, warmup_steps=6)


def test_a_constant_rate_is_warmed_up(settings):
    run(settings, scheduler="constant", warmup_steps=4, log_steps=1)
    log = read_log(Path(settings["output"]) / "train_log.jsonl")
    rates = [line["learning_rate"] for line in log if "learning_rate" in line]
    assert rates == pytest.approx([0, 0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3])


def test_a_pickle_is_not_read(settings, model_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"could not be loaded: .*safetensors"):
        run(settings, model=str(folder))


@pytest.mark.parametrize("is_folder", [False, True])
def test_gguf_files_are_refused_unread(settings, tmp_path, is_folder):
    file = tmp_path / "models" / "m.gguf"
    file.parent.mkdir()
    file.touch()
    named = file.parent if is_folder else file
    with pytest.raises(
        ValueError, match=f"^GGUF files cannot be trained: make a folder of {named} "
    ):
        run(settings, model=str(named))


def test_an_adapter_alone_is_refused(settings, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match=r"is a LoRA adapter; merge it into its base, some/base,"):
        run(settings, model=str(tmp_path))


@pytest.mark.parametrize("changes", [{}, {"from_scratch": True}])
def test_quantized_weights_are_refused_before_the_data_are_read(
    settings, model_folder, tmp_path, monkeypatch, changes
):
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    fields = {**json.loads(file.read_text()), "quantization_config": {"quant_method": "gptq"}}
    file.write_text(json.dumps(fields))
    monkeypatch.delattr("layerskip.training.run.load_rows")
    with pytest.raises(ValueError, match=r"^weights quantized by 'gptq' are not supported$"):
        run(settings, model=str(tmp_path / "model"), **changes)


def test_a_full_disk_at_the_weights_is_said_too(settings, monkeypatch):
    def full(self, output_dir=None, **_):
        raise SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(LayerSkipTrainer, "_save", full)
    with pytest.raises(
        UnwrittenCheckpointError, match=r"step 2 .*No space left.* no checkpoint yet"
    ):
        run(settings)
    assert not (Path(settings["output"]) / ".incomplete").exists()


def test_a_gradient_that_is_not_finite_stops_training(settings, monkeypatch):
    plain = LayerSkipTrainer.training_step

    def step(self, model, *arguments, **options):
        loss = plain(self, model, *arguments, **options)
        if self.state.global_step == 3:
            next(model.parameters()).grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(LayerSkipTrainer, "training_step", step)
    with pytest.raises(NonFiniteLossError, match=r"norm of the gradient is nan at step 4; .*-2"):
        run(settings)


def test_what_is_trained_on_is_no_evaluation(settings):
    with pytest.raises(ValueError, match="eval_data is what is trained on"):
        run(settings, eval_data=settings["data"])
    with pytest.raises(ValueError, match="eval_split is for data sets of the hub"):
        run(settings, eval_data=settings["data"], eval_split="test")
    data = Path(settings["data"])
    same = str(data.parent / ".." / data.parent.name / data.name)
    with pytest.raises(ValueError, match="of eval_data is trained on; give other rows"):
        run(settings, data=str(data.parent / "*.jsonl"), eval_data=same)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 2), ({"exits": [3], "curriculum": "all"}, 3), ({"fixed_exits": [2, 3]}, 2)],
)
def test_the_exit_for_decoding_is_one_that_was_trained(settings, changes, expected):
    assert run(settings, max_steps=1, **changes).exit_layer == expected


@pytest.mark.parametrize(
    ("layers", "recipe", "expected"),
    [
        (12, {"curriculum": "all"}, 3),
        (16, {"curriculum": "all", "exit_weighting": "linear"}, 4),
        (12, {"curriculum": "all", "exits": (2, 4)}, 2),  # of two as near, the one that costs less
        (12, {"curriculum": "none"}, 3),
    ],
)
def test_the_exit_for_decoding_is_near_a_quarter_of_the_layers(layers, recipe, expected, tmp_path):
    config = LlamaConfig(num_hidden_layers=layers)
    config.save_pretrained(tmp_path)
    found = TrainConfig.from_mapping({"model": str(tmp_path), "data": "d", "output": "o", **recipe})
    assert check_layers(found) == expected


def test_tokens_that_the_model_does_not_embed_are_said(settings, model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "larger")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 plus 2 is", "completion": "new"}\n')
    changes = {"tokenizer": str(tmp_path / "larger"), "data": str(tmp_path / "rows.jsonl")}
    with pytest.raises(ValueError, match="have the token 48, but this model embeds 48"):
        run(settings, **changes)


def test_a_tokenizer_without_pad_and_end_tokens(settings, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "model" / name
        if file.exists():
            fields = json.loads(file.read_text())
            kept = {k: v for k, v in fields.items() if k not in ("pad_token", "eos_token")}
            file.write_text(json.dumps(kept))
    assert run(settings, model=str(tmp_path / "model"), max_steps=2).steps == 2


def test_settings_that_name_a_temperature_without_sampling_can_be_saved(
    settings, model_folder, tmp_path
):
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    of_before = ("costs", "draft_text", "draft_vocabulary", "tuning", "weights")
    own = {"layerskip": {name: {"of": "before"} for name in of_before}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.9, **own}))
    result = run(settings, model=str(tmp_path / "model"), max_steps=2, fixed_exits=[2])
    written = json.loads((result.output / "generation_config.json").read_text())
    assert (written["assistant_early_exit"], written["temperature"]) == (2, 0.9)
    assert not any(value == {"of": "before"} for value in written.get("layerskip", {}).values())
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": -1}))
    with pytest.raises(ValueError, match=r"will not write this model's generation_config\.json"):
        run(settings, model=str(tmp_path / "model"), output=str(tmp_path / "other"))


def test_a_part_of_a_hub_data_set(settings, monkeypatch):
    asked = []

    def load_dataset(source, config, *, split):
        asked.append((source, config, split))
        return [{"prompt": "3 plus 4 is", "completion": "7"}] * 8

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    named = {"data": "some/sums", "eval_data": "some/sums", "eval_split": "test"}
    run(settings, **named, data_config="main", max_steps=1)
    assert asked == [("some/sums", "main", "train"), ("some/sums", "main", "test")]


def test_other_rows_to_evaluate_on_after_a_resume_are_said(settings, interrupted):
    settings |= {"eval_rows": 4, "max_steps": 8}
    interrupted(settings, 5)
    with pytest.warns(TrainingWarning, match="rows to evaluate on may have been trained on"):
        run(settings, resume=True, eval_rows=5)


def test_another_model_after_a_resume_is_said(settings, interrupted, model_folder, tmp_path):
    interrupted(settings, 3)
    other = shutil.copytree(model_folder, tmp_path / "other")
    with pytest.warns(TrainingWarning, match="^model: another .* weights are those of the check"):
        run(settings, resume=True, model=str(other))


def test_other_rows_after_a_resume_are_said(settings, interrupted):
    interrupted(settings, 3, seed=1)
    with pytest.warns(TrainingWarning, match="^seed: another than before .* or are left out$"):
        run(settings, resume=True, seed=2)


def test_other_rows_under_the_same_name_after_a_resume_are_said(settings, interrupted, tmp_path):
    data = tmp_path / "grows.jsonl"
    shutil.copyfile(settings["data"], data)
    settings |= {"data": str(data), "max_steps": 8}
    interrupted(settings, 3)
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "3 plus 4 is", "completion": " 7"}) + "\n")
    with pytest.warns(TrainingWarning, match="^the rows are others than before the interruption"):
        run(settings, resume=True)


def test_weights_under_an_adapter_are_in_float32_where_products_are_in_float16(
    settings, model_folder, tmp_path
):
    """The gradients of exits are too small for float16, so norm and head work in float32."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model_folder, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(model_folder).half().save_pretrained(tmp_path / "base")
    changes = {"model": str(tmp_path / "base"), "lora_rank": 4, "precision": "float16"}
    model = load_model(TrainConfig.from_mapping(settings | changes))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_exit_that_the_time_was_too_short_for_is_said(settings, monkeypatch):
    # The curriculum opens exits from the last down: exit 2 of 4 after a quarter of the steps.
    settings |= {"curriculum": "gradual", "exit_layer": 2, "max_steps": 40}
    plain = LayerSkipTrainer.training_step

    def ends(self, *args, **kwargs):
        self.control.should_training_stop = self.state.global_step >= 4
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LayerSkipTrainer, "training_step", ends)
        with pytest.warns(TrainingWarning, match="before exit 2 had a loss"):
            run(settings)


def test_a_home_folder_is_found(settings, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = TrainConfig(
        model="~/model",
        data="rows.jsonl",
        output="~/out",
    )
    assert (config.model, config.output) == (str(tmp_path / "model"), str(tmp_path / "out"))


def test_a_place_that_cannot_be_written_to_is_refused_at_once(settings, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written to: choose another --output"):
        run(settings, output=str(tmp_path / "file" / "out"))


def test_a_resume_without_a_checkpoint_says_that_it_begins_anew(settings):
    with pytest.warns(TrainingWarning, match="there is no checkpoint in .*: beginning anew"):
        run(settings, resume=True, max_steps=1)


def test_packing_is_for_models_that_keep_documents_apart(settings, model_folder, tmp_path):
    """OPT counts positions, but lets a document see what was packed before it."""
    config = OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "opt")
    changes = {"model": str(tmp_path / "opt"), "max_steps": 1, "max_length": 24}
    with pytest.warns(TrainingWarning, match="nothing will draft with the result"):
        assert run(settings, **changes, output=str(tmp_path / "rows")).steps == 1
    with pytest.raises(ValueError, match="packing needs attention that ends where positions start"):
        run(settings, **changes, packing=True)


def test_decoding_stops_where_the_answers_of_a_template_end(settings, model_folder, tmp_path):
    """The end token of the tokenizer is that of a base model, and the template has another."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "<pad> is")
    tokenizer.save_pretrained(tmp_path / "chat")
    turns = [{"role": "user", "content": "1 plus 2"}, {"role": "model", "content": "3"}]
    data = tmp_path / "turns.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n")
    ends = {}
    for rows in (str(data), settings["data"]):
        output = tmp_path / Path(rows).stem
        changes = {"data": rows, "tokenizer": str(tmp_path / "chat"), "output": str(output)}
        run(settings, max_steps=1, **changes)
        ends[rows] = json.loads((output / "generation_config.json").read_text())["eos_token_id"]
    assert ends == {str(data): [2, 0], settings["data"]: 2}


def test_a_folder_is_for_one_run_at_a_time(settings):
    output = Path(settings["output"])
    output.mkdir()
    with FileLock(output / ".lock"), pytest.raises(ValueError, match="another run is writing into"):
        run(settings)
    assert run(settings, max_steps=1).steps == 1
    assert not (output / ".lock").exists()


def test_a_run_goes_on_as_it_was_begun(settings, interrupted):
    interrupted(settings, 3, lora_rank=2)
    for changes in ({}, {"lora_rank": 3}, {"lora_rank": 2, "lora_alpha": 3}):
        with pytest.raises(ValueError, match="begun with lora_rank 2, lora_alpha None: it goes on"):
            run(settings, resume=True, **changes)
    with pytest.warns(TrainingWarning, match="a step has another number of rows than before"):
        run(settings, resume=True, lora_rank=2, batch_size=2, max_steps=4)
    same = {"batch_size": 1, "accumulation": 2, "lora_rank": 2, "lora_alpha": 4, "max_steps": 5}
    assert run(settings, resume=True, **same).steps == 5


def test_a_picture_that_cannot_be_written_costs_no_result(settings, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layerskip.training.run.plot_run", full)
    with pytest.warns(
        TrainingWarning, match="the result is whole, but its pictures .*No space left"
    ):
        result = run(settings, max_steps=1)
    assert weights(result.output)


def test_files_that_transformers_would_add_are_refused(settings, model_folder, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "another"}')
    with pytest.raises(ValueError, match="has an adapter beside its weights: merge it"):
        run(settings, model=str(model))
    (model / "adapter_config.json").unlink()
    (model / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = {"weight_map": {"lm_head.weight": "../x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        run(settings, model=str(model))


def changed_model(folder, target, change):
    """A copy of a model whose tensors were changed in place."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


def test_a_model_that_lacks_weights_is_not_made_up(settings, model_folder, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    lacking = changed_model(model_folder, tmp_path / "lacking", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=f"lacks {name}, which its config.json asks for"):
        run(settings, model=lacking)
    other = changed_model(
        model_folder, tmp_path / "other", lambda t: t.update({name: torch.ones(3, 4)})
    )
    with pytest.raises(ValueError, match=f"has another shape of {name}"):
        run(settings, model=other)
    more = changed_model(
        model_folder, tmp_path / "more", lambda t: t.update({"value_head": torch.ones(3)})
    )
    with pytest.warns(TrainingWarning, match="knows nothing of, such as value_head: they are left"):
        run(settings, model=more, max_steps=1)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", 900, "model.safetensors is damaged or incomplete"),
        ("tokenizer.json", 25, "no tokenizer in .*model: Unterminated string"),
        ("config.json", 25, "no model in "),
        ("tokenizer_config.json", "[]", "no tokenizer in "),
    ],
)
def test_a_broken_model_is_named(settings, model_folder, tmp_path, name, content, message):
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / name
    is_cut = isinstance(content, int)
    file.write_bytes(file.read_bytes()[:content] if is_cut else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        run(settings, model=str(tmp_path / "model"))
    assert "\n" not in str(error.value)


DAMAGE = [  # file, bytes that are left of it, what is said
    ("optimizer.pt", None, r"optimizer\* is missing"),
    ("scheduler.pt", None, r"scheduler\* is missing"),
    ("rng_state.pth", None, r"rng_state\* is missing"),
    ("model.safetensors", None, "model.safetensors is missing"),
    ("trainer_state.json", None, "trainer_state.json cannot be read"),
    ("trainer_state.json", 10, "trainer_state.json cannot be read"),
    ("optimizer.pt", 2000, "optimizer.pt is cut off or damaged"),
    ("rng_state.pth", 0, "rng_state.pth is cut off or damaged"),
    ("model.safetensors", 2000, "model.safetensors is cut off or damaged"),
]


def test_no_run_goes_on_from_a_part_of_a_checkpoint(settings, interrupted, monkeypatch):
    interrupted(settings, 6)
    checkpoint = Path(settings["output"], "checkpoint-4")
    with monkeypatch.context() as patch:  # before anything takes long
        patch.delattr("layerskip.training.run.load_tokenizer")
        for name, keep, message in DAMAGE:
            file = checkpoint / name
            content = file.read_bytes()
            file.unlink()
            if keep is not None:
                file.write_bytes(content[:keep])
            said = f"{message}.*; remove .*checkpoint-4, and --resume"
            with pytest.raises(ValueError, match=said):
                run(settings, resume=True)
            file.write_bytes(content)
    shutil.rmtree(checkpoint)
    assert run(settings, resume=True).steps == 6


def test_tensorboard_that_cannot_be_written_costs_no_step(settings, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.warns(TrainingWarning, match="TensorBoard's files .*No space left") as said:
        result = run(settings)
    assert len([w for w in said if "TensorBoard" in str(w.message)]) == 1
    assert [log["step"] for log in read_log(result.output / "train_log.jsonl")][:3] == [2, 4, 6]


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin", "tokenizer.json", "x.gguf"])
def test_files_of_another_model_are_not_replaced(settings, name):
    output = Path(settings["output"])
    output.mkdir()
    (output / name).write_text("mine")
    with pytest.raises(ValueError, match="has a checkpoint, which training would replace"):
        run(settings)
    assert (output / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["train.json", "train_log.jsonl", "rows.json"])
@pytest.mark.parametrize("field", ["data", "eval_data"])
def test_rows_that_the_run_would_replace_are_refused(settings, name, field):
    output = Path(settings["output"])
    output.mkdir()
    (output / name).write_text('{"prompt": "1+1=", "completion": "2"}')
    asked = settings | {field: str(output / name)}
    with pytest.raises(ValueError, match=f"training replaces .*{name}"):
        run(asked)
    assert "1+1=" in (output / name).read_text()


def test_several_gpus_in_one_process_are_refused_at_once(settings, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delattr("layerskip.training.run.load_model")
    with pytest.raises(ValueError, match="2 GPUs in one process are not supported: start with"):
        run(settings, device="auto")


def test_fsdp_divides_what_adapters_need_whole(settings, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="needs whole weights, which FSDP divides"):
        run(settings, lora_rank=2)


def test_a_result_without_weights_is_none(settings, monkeypatch):
    def nothing(self, folder, _internal_call=False):
        os.makedirs(folder, exist_ok=True)

    monkeypatch.setattr(LayerSkipTrainer, "save_model", nothing)
    with pytest.raises(UnwrittenCheckpointError, match="the Trainer wrote no weights"):
        run(settings, max_steps=1, save_steps=100)


@pytest.mark.parametrize("name", ["train_log.jsonl", "train.json", ".lock", "loss_per_exit.png"])
def test_a_link_out_of_the_output_folder_is_not_written_through(settings, tmp_path, name):
    own = tmp_path / "profile"
    own.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(own)
    with pytest.raises(ValueError, match=r"is a link to .*profile, outside of its folder"):
        run(settings)
    assert own.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows links")
def test_a_log_that_becomes_a_link_is_not_appended_to(settings, tmp_path):
    own = tmp_path / "profile"
    own.write_text("mine")
    log = tmp_path / "out" / "train_log.jsonl"

    def swap(progress):
        if log.exists() and not log.is_symlink():
            log.unlink()
            log.symlink_to(own)

    with pytest.raises(UnwrittenCheckpointError, match="the log of step"):
        train(TrainConfig.from_mapping(settings), swap)
    assert own.read_text() == "mine"


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("from_scratch", [True, False])
def test_a_config_names_no_kernels(settings, model_folder, tmp_path, name, from_scratch):
    """transformers would fetch compiled code from the hub and run it."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    fields = json.loads((model / "config.json").read_text())
    named = {name: "kernels-community/none", "experts_implementation": "none/none"}
    (model / "config.json").write_text(json.dumps(fields | named))
    changes = {"model": str(model), "max_length": 1024, "from_scratch": from_scratch}
    loaded = load_model(TrainConfig.from_mapping({**settings, **changes}))
    assert loaded.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("file", ["config.json", "config.5.0.0.json"])
def test_a_config_names_no_other_weights(settings, model_folder, tmp_path, file):
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    fields = json.loads((model / "config.json").read_text())
    other = {"transformers_weights": "other.safetensors.index.json"}
    if file != "config.json":  # that transformers reads in its place
        (model / "config.json").write_text(json.dumps({**fields, "configuration_files": [file]}))
    (model / file).write_text(json.dumps({**fields, **other}))
    config = TrainConfig.from_mapping({**settings, "model": str(model)})
    with pytest.raises(ValueError, match=r"^a config that names its weights \(other\."):
        load_model(config)


def test_adapters_on_the_hub_are_refused(settings, monkeypatch):
    asked = []

    def find(name):
        asked.append(name)
        return "adapter_config.json"

    monkeypatch.setattr("layerskip.training.loading.find_adapter_config_file", find)
    with pytest.raises(ValueError, match=r"^owner/name on the hub is or has an adapter: merge it"):
        run(settings, model="owner/name")
    assert asked == ["owner/name"]


def test_a_built_in_gguf_file_is_unpacked(tmp_path, monkeypatch):
    model = tiny_models.build("llama2")
    fields = {"llama.vocab_size": model.config.vocab_size}
    gguf_files.write(tmp_path / "model.gguf", model, extra_fields=fields)
    monkeypatch.setattr("layerskip.training.loading.pull", lambda name: tmp_path)
    loaded = pretrained_model("smollm2-135m").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor)
