"""Whole runs of `train` on a tiny model."""

import dataclasses
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

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.trainer_callback import TrainerState

import causal_lms
from layerskip import LayerSkipModel
from layerskip.errors import NonFiniteLossError, TrainingWarning, UnwrittenCheckpointError
from layerskip.training import LayerSkipTrainer, TrainConfig, train
from layerskip.training.callbacks import read_log
from layerskip.training.checkpointing import LOG, last_checkpoint
from layerskip.training.data import LeftOutWarning
from layerskip.training.run import prompt_form

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def run(settings, **changes):
    return train(TrainConfig.from_mapping({**settings, **changes}))


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def training_logs(folder):
    return [log for log in read_log(Path(folder) / "train_log.jsonl") if "loss" in log]


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_result_is_an_ordinary_checkpoint(settings, model_folder, pictures, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr("layerskip.training.run.plot_run", pictures)
    result = run(settings, eval_rows=10, fixed_exits=[2], accumulation=2, draft_tokens=7)
    assert (result.steps, result.exit_layer) == (6, 2)
    model = AutoModelForCausalLM.from_pretrained(result.output)
    tokenizer = AutoTokenizer.from_pretrained(result.output)
    generation = json.loads((result.output / "generation_config.json").read_text())
    assert generation["assistant_early_exit"] == model.generation_config.assistant_early_exit == 2
    assert generation["num_assistant_tokens"] == 7
    assert model.generation_config.layerskip == generation["layerskip"]
    assert "draft_text" not in generation["layerskip"]  # only with keep_draft_text
    before = json.loads(Path(model_folder, "config.json").read_text())
    after = json.loads((result.output / "config.json").read_text())
    for name in ("use_cache", "eos_token_id", "bos_token_id", "num_hidden_layers"):
        assert after.get(name) == before.get(name), name
    inputs = tokenizer("3 plus 4 is", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1
    logs = training_logs(result.output)
    expected = {"loss_exit_2", "accuracy_exit_4", "tokens_per_s", "skip_rate_last", "step"}
    assert expected <= {*logs[0]}
    assert logs[0]["skip_rates"] == pytest.approx([0.0, 0.077976, 0.17622, 0.3], abs=1e-6)
    assert result.metrics["eval_loss"] == result.metrics["eval_loss_exit_4"]
    assert {"eval_loss_exit_2", "eval_accuracy_exit_1"} <= {*result.metrics}
    for name in ("loss_per_exit.png", "accuracy_over_layers.png"):
        assert (result.output / name).exists()
    assert not any((result.output / name).exists() for name in (".incomplete", ".lock"))
    saved = json.loads((result.output / "train.json").read_text())
    assert TrainConfig.from_mapping(saved).effective_recipe.fixed_exits == (2,)
    [folder] = (result.output / "runs").iterdir()
    scalars = EventAccumulator(str(folder)).Reload().Scalars("train/loss_exit_2")
    assert {s.step: s.value for s in scalars} == pytest.approx(
        {log["step"]: log["loss_exit_2"] for log in logs}
    )


def test_training_learns(settings):
    result = run(settings, max_steps=60, log_steps=10, save_steps=100, curriculum="all", p_max=0.1)
    losses = training_logs(result.output)
    for exit_layer in (2, 4):
        name = f"loss_exit_{exit_layer}"
        assert losses[-1][name] < 0.85 * losses[0][name]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        (
            {"prompt": "{prompt}\n"},
            {"text": "ending in a line break", "example": "{prompt}\n", "ending": "\n"},
        ),
        (
            {"ending_of_rows": "\n"},
            {"text": "ending in a line break", "example": "{prompt}\n", "ending": "\n"},
        ),
        (
            {"prompt": "{prompt}: ", "ending_of_rows": "\n"},
            {"text": "ending in ': '", "example": "{prompt}: ", "ending": ": "},
        ),
        (
            {"prompt_form": "a sum", "prompt_example": "1 plus 1 is\n"},
            {"text": "a sum", "example": "1 plus 1 is\n", "ending": "\n"},
        ),
        (
            {"prompt": "{prompt} is", "prompt_form": "a sum", "prompt_example": "1 plus 1 is"},
            {"text": "a sum", "example": "1 plus 1 is", "ending": " is"},
        ),
    ],
)
def test_the_form_of_the_prompts_is_that_of_settings_template_or_rows(settings, changes, expected):
    changes = {**changes}
    ending = changes.pop("ending_of_rows", "")
    form = prompt_form(TrainConfig.from_mapping({**settings, **changes}), ending)
    assert (form and dataclasses.asdict(form)) == expected


def test_the_result_has_the_form_of_its_prompts(settings, tmp_path):
    rows = [{"prompt": f"{i} plus 1 is", "completion": f"{i + 1}"} for i in range(9)]
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(settings, data=str(data), prompt="{prompt}\n", max_steps=1)
    form = LayerSkipModel.from_pretrained(result.output, dtype="float32").settings.prompt_form
    assert (form.text, form.fits("3 plus 1 is\n")) == ("ending in a line break", True)
    assert not form.fits("3 plus 1 is")


def test_repeated_labels_are_kept_on_request(settings, tmp_path):
    rows = [{"prompt": f"{i} plus 1 is", "completion": f" more than {i} , I say"} for i in range(9)]
    data = tmp_path / "alike.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(settings, data=str(data), keep_datastore=True, max_steps=1)
    model = LayerSkipModel.from_pretrained(result.output, dtype="float32")
    assert model.settings.draft_text[-1] == model.tokenizer.eos_token_id  # whole rows
    labels = [i for i in model.settings.draft_text if i >= 0]
    assert labels


@pytest.mark.parametrize(
    "changes", [{"accumulation": 2}, {"packing": True, "max_length": 24}, {"lora_rank": 2}]
)
def test_resume_is_bit_for_bit(settings, tmp_path, interrupted, changes):
    changes = {**changes, "max_steps": 10, "save_steps": 4, "keep_checkpoints": 9}
    changes |= {"curriculum": "rotational", "rotation": 3}
    whole = run(settings, **changes)
    half = tmp_path / "half"
    interrupted(settings, 10, **changes, output=str(half))
    assert last_checkpoint(half).endswith("checkpoint-4" if "accumulation" in changes else "-8")
    resumed = run(settings, **changes, output=str(half), resume=True)
    assert resumed.steps == 10
    assert_same_weights(whole.output, half)
    exits = [[sorted(log) for log in training_logs(folder)] for folder in (whole.output, half)]
    assert exits[0] == exits[1]
    steps = [log["step"] for log in training_logs(half)]
    assert steps == sorted(set(steps))


def test_experts_are_resumed(settings, model_folder, tmp_path, interrupted):
    """Checkpoints have one tensor for each expert, the model has them stacked."""
    folder = tmp_path / "mixture"
    ignored = shutil.ignore_patterns("*.safetensors", "*config*")
    shutil.copytree(model_folder, folder, ignore=ignored)
    shutil.copy(Path(model_folder) / "tokenizer_config.json", folder)
    vocabulary = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    causal_lms.build("qwen3_moe", vocab_size=vocabulary).save_pretrained(folder)
    changes = {"model": str(folder), "max_steps": 8, "save_steps": 3}
    whole = run(settings, **changes)
    half = tmp_path / "half"
    interrupted(settings, 5, **changes, output=str(half))
    run(settings, **changes, output=str(half), resume=True)
    assert_same_weights(whole.output, half)


def test_a_resume_uses_the_present_intervals_learning_rate_and_weight_decay(
    settings, interrupted, monkeypatch
):
    changes = {"scheduler": "linear", "log_steps": 1, "max_steps": 8, "keep_checkpoints": 9}
    interrupted(settings, 6, **changes, save_steps=4, weight_decay=0.1)
    decays = []

    def watched(self, *args, **kwargs):
        decays.append([group["weight_decay"] for group in self.optimizer.param_groups])
        return plain(self, *args, **kwargs)

    plain = LayerSkipTrainer.training_step
    monkeypatch.setattr(LayerSkipTrainer, "training_step", watched)
    run(settings, **changes, save_steps=3, weight_decay=0.2, learning_rate=1e-4, resume=True)
    rates = [line["learning_rate"] for line in training_logs(settings["output"])]
    factors = [1 - step / 8 for step in range(8)]
    assert rates == pytest.approx([1e-3 * f for f in factors[:4]] + [1e-4 * f for f in factors[4:]])
    assert decays == [[0.2, 0.0]] * 4
    names = {path.name for path in Path(settings["output"]).glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (4, 6, 8)}


def test_a_finished_run_is_resumed_without_a_step(settings, model_folder, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "other")
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**fields, "eos_token_id": 3}))
    changes = {"model": str(model), "max_steps": None, "epochs": 0.2}
    whole = run(settings, **changes)
    before = shutil.copytree(whole.output, tmp_path / "before")
    (whole.output / "model.safetensors").unlink()  # killed while it wrote the result
    resumed = run(settings, **changes, resume=True)
    assert resumed.steps == whole.steps == 5
    assert_same_weights(before, whole.output)
    for name in ("config.json", "generation_config.json"):
        assert (before / name).read_text() == (whole.output / name).read_text()
    assert json.loads((before / "config.json").read_text())["eos_token_id"] == 2
    assert run(settings, **changes | {"epochs": 0.4}, resume=True).steps == 10


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}  # as in these tests: sums depend on it
_SCRIPT = """
import json, sys
from layerskip.training import TrainConfig, train
train(TrainConfig.from_mapping(json.loads(sys.argv[1])))
"""
# Cuts off a file of checkpoint-3, and dies by SIGKILL.
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


def test_a_killed_run_resumes_bit_for_bit(settings, tmp_path):
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


def test_sigterm_ends_like_ctrl_c(settings, tmp_path):
    out = tmp_path / "out"
    flags = {**settings, "max_steps": 100_000, "save_steps": 100_000, "output": str(out)}
    words = [w for n, v in flags.items() for w in (f"--{n.replace('_', '-')}", str(v))]
    command = [Path(sys.executable).with_name("layerskip"), "train", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    try:
        while not read_log(out / LOG) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "Traceback" not in stderr
    assert stderr.count("the last good checkpoint is") == 1
    assert not (out / ".lock").exists()
    saved = TrainerState.load_from_json(f"{last_checkpoint(out)}/trainer_state.json").global_step
    assert run(flags, max_steps=saved + 1, resume=True).steps == saved + 1


@pytest.fixture
def signals(monkeypatch):
    """Runs that get Ctrl-C in their n-th step, once or more often."""

    def run_with_signals(settings, step, *, times=1, **changes):
        plain, count = LayerSkipTrainer.training_step, itertools.count(1)
        usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for &

        def step_with_signals(self, *args, **kwargs):
            if next(count) == step:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return plain(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(LayerSkipTrainer, "training_step", step_with_signals)
            with (
                pytest.warns(TrainingWarning, match="Ctrl-C again ends the run at once"),
                pytest.raises(KeyboardInterrupt),
            ):
                train(TrainConfig.from_mapping({**settings, **changes}))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, usual)

    return run_with_signals


def test_ctrl_c_keeps_the_step(settings, tmp_path, signals):
    whole = run(settings, save_steps=6)
    out = tmp_path / "stopped"
    signals(settings, 3, save_steps=6, output=str(out))
    assert last_checkpoint(out).endswith("checkpoint-3")
    run(settings, save_steps=6, output=str(out), resume=True)
    assert_same_weights(whole.output, out)


def test_a_second_ctrl_c_ends_at_once(settings, signals):
    signals(settings, 3, times=2, save_steps=6)
    assert last_checkpoint(settings["output"]) is None


def raise_disk_full(*_, **__):
    raise OSError(28, "No space left on device")


def test_a_full_disk_loses_nothing(settings, monkeypatch):
    """PyTorch, safetensors and tokenizers raise errors of their own."""
    folder = Path(settings["output"])
    save, save_pretrained = torch.save, PreTrainedTokenizerFast.save_pretrained

    def full_optimizer(values, path, *args, **kwargs):
        if "checkpoint-4" in str(path) and Path(path).name == "optimizer.pt":
            raise RuntimeError(
                "[enforce fail at inline_container.cc:1] PytorchStreamWriter\nfailed"
            )
        return save(values, path, *args, **kwargs)

    def full_weights(*_, **__):
        raise SafetensorError("Error while serializing: No space left on device")

    def full_tokenizer(self, where, *args, **kwargs):
        if Path(where).name == ".incomplete":
            raise Exception("No space left on device\n(os error 28)")
        return save_pretrained(self, where, *args, **kwargs)

    for target, name, replacement, message in (
        (LayerSkipTrainer, "_save", full_weights, "the checkpoint of step 2"),
        (torch, "save", full_optimizer, "the checkpoint of step 4"),
        (PreTrainedTokenizerFast, "save_pretrained", full_tokenizer, "the result of step 6"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, replacement)
            with pytest.raises(UnwrittenCheckpointError) as error:
                run(settings, resume=bool(last_checkpoint(folder)))
        assert str(error.value).startswith(f"{message} could not be written to {folder} (")
        good = last_checkpoint(folder)
        assert (f"checkpoint is {good}. Make room" if good else "no checkpoint yet") in str(
            error.value
        )
        assert "\n" not in str(error.value)
        assert not (folder / ".incomplete").exists()
    # Without its weights a folder does not look like a checkpoint.
    assert not list(folder.glob("*.safetensors"))
    assert run(settings, resume=True).steps == 6
    assert weights(folder)


def test_a_plot_that_cannot_be_written_costs_no_result(settings, monkeypatch):
    monkeypatch.setattr("layerskip.training.run.plot_run", raise_disk_full)
    with pytest.warns(TrainingWarning, match="result is whole, but its pictures .*No space left"):
        result = run(settings, max_steps=1)
    assert weights(result.output)


def test_a_loss_that_is_not_finite_ends_the_run(settings):
    """The checkpoint before it may have bad weights already."""
    message = r"loss is \w+ at step 3: .* is \S+checkpoint-1 \(checkpoint-2 may have been bad"
    changes = {"max_grad_norm": 0, "warmup_steps": 2, "max_steps": 50, "save_steps": 1}
    with pytest.raises(NonFiniteLossError, match=message):
        run(settings, learning_rate=1e30, **changes)
    shutil.rmtree(Path(settings["output"], "checkpoint-2"))
    assert run(settings, learning_rate=1e-3, **changes | {"max_steps": 4}, resume=True).steps == 4


def test_a_gradient_that_is_not_finite_ends_the_run(settings, monkeypatch):
    """At the last step, too, which is logged in any case: no loss comes after it."""
    plain = LayerSkipTrainer.training_step

    def step(self, model, *arguments, **options):
        loss = plain(self, model, *arguments, **options)
        if self.state.global_step == 4:
            next(model.parameters()).grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(LayerSkipTrainer, "training_step", step)
    with pytest.raises(NonFiniteLossError, match=r"norm of the gradient is nan at step 5: .*-2"):
        run(settings, max_steps=5, log_steps=3)
    assert not (Path(settings["output"]) / "model.safetensors").exists()


def test_lora_is_merged_and_saved_beside(settings, model_folder):
    import peft

    result = run(settings, lora_rank=4)
    trained, before = weights(result.output), weights(model_folder)
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in before)
    merged = AutoModelForCausalLM.from_pretrained(result.output)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    both = peft.PeftModel.from_pretrained(base, result.output / "adapter")
    tokens = torch.arange(4, 20)[None]
    torch.testing.assert_close(merged(tokens).logits, both(tokens).logits, rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_under_an_adapter_are_rounded_once(settings, model_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(model_folder).bfloat16()
    shutil.copytree(model_folder, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    changes = {"model": str(tmp_path / "base"), "lora_rank": 4}
    folder = run(settings, **changes, precision="bfloat16", packing=True, max_length=24).output
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert {w.dtype for w in adapter.values()} == {torch.float32}
    trained, before = weights(folder), weights(tmp_path / "base")
    assert {w.dtype for w in trained.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    for name, weight in trained.items():
        a, b = (adapter.get(f"base_model.model.{name[:-7]}.lora_{x}.weight") for x in "AB")
        change = 2 * (b @ a) if a is not None else 0  # the default scale is twice the rank
        exact = before[name].float() + change
        assert (weight - exact).abs().le(exact.abs() * 2**-8 + 1e-9).all()
    assert any(not torch.equal(trained[name], before[name]) for name in before)


def test_from_scratch_and_gradient_checkpointing(settings, model_folder):
    changes = {"regime": "pretrain", "rotation": 3, "gradient_checkpointing": True}
    result = run(settings, from_scratch=True, seed=5, learning_rate=1e-9, **changes)
    trained, before = weights(result.output), weights(model_folder)
    assert trained.keys() == before.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert (trained[name] - before[name]).abs().max() > 1e-2


def test_seeds_repeat_a_run(settings, tmp_path):
    folders = [
        run(settings, output=str(tmp_path / name), seed=seed, max_steps=2).output
        for name, seed in (("first", 0), ("second", 0), ("other", 1))
    ]
    assert_same_weights(*folders[:2])
    with pytest.raises(AssertionError):
        assert_same_weights(*folders[1:])


def test_progress_is_reported_and_nothing_is_printed(settings, capfd):
    from datasets import are_progress_bars_disabled
    from transformers.utils import logging

    before = (logging.is_progress_bar_enabled(), are_progress_bars_disabled())
    reports = []
    config = TrainConfig.from_mapping({**settings, "eval_rows": 8, "eval_steps": 3, "log_steps": 4})
    train(config, reports.append)
    assert [report.step for report in reports if not report.logs] == [*range(7)]
    assert {report.total_steps for report in reports} == {6}
    assert [report.step for report in reports if "loss" in report.logs] == [4, 6]
    assert [report.step for report in reports if "eval_loss" in report.logs] == [3, 6]
    assert capfd.readouterr() == ("", "")
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before


def test_warm_up(settings):
    with pytest.warns(TrainingWarning, match="warmup_steps is 6, but there are 6 steps"):
        run(settings, scheduler="constant", warmup_steps=6, log_steps=1)
    rates = [line["learning_rate"] for line in training_logs(settings["output"])]
    assert rates == pytest.approx([1e-3 * n / 6 for n in range(6)])


def test_decoding_stops_at_the_end_of_the_template_s_answers(settings, model_folder, tmp_path):
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


def test_older_generation_settings_can_be_saved(settings, model_folder, tmp_path):
    """A temperature without sampling; and what was measured before the training is dropped."""
    shutil.copytree(model_folder, tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    names = ("costs", "draft_text", "draft_vocabulary", "tuning", "weights")
    own = {"layerskip": {name: {"of": "before"} for name in names}}
    file.write_text(json.dumps({**json.loads(file.read_text()), "temperature": 0.9, **own}))
    result = run(settings, model=str(tmp_path / "model"), max_steps=2, fixed_exits=[2])
    saved = json.loads((result.output / "generation_config.json").read_text())
    assert (saved["assistant_early_exit"], saved["temperature"]) == (2, 0.9)
    assert not any(value == {"of": "before"} for value in saved.get("layerskip", {}).values())
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": -1}))
    with pytest.raises(ValueError, match=r"will not write this model's generation_config\.json"):
        run(settings, model=str(tmp_path / "model"), output=str(tmp_path / "other"))


def test_an_exit_that_the_time_was_too_short_for(settings, monkeypatch):
    # The curriculum opens exits from the last down: exit 2 of 4 after a quarter of the steps.
    settings |= {"curriculum": "gradual", "exit_layer": 2, "max_steps": 40}
    plain = LayerSkipTrainer.training_step

    def ends(self, *args, **kwargs):
        self.control.should_training_stop = self.state.global_step >= 4
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LayerSkipTrainer, "training_step", ends)
    with pytest.warns(TrainingWarning, match="before exit 2 had a loss"):
        run(settings)


@pytest.fixture
def prepared(settings, monkeypatch):
    """The trainer that settings make, before it trains."""

    def trainer_of(**changes):
        trainers = []

        def stop(self, **_):
            trainers.append(self)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LayerSkipTrainer, "train", stop)
            with pytest.raises(KeyboardInterrupt):
                run(settings, **changes)
        return trainers[0]

    return trainer_of


def test_settings_reach_the_trainer(prepared):
    changes = {"precision": "bfloat16", "weight_decay": 0.1, "gradient_checkpointing": True}
    changes |= {"compile": True, "eval_exits": [2], "eval_rows": 4, "max_grad_norm": 0.5}
    trainer = prepared(**changes, lora_rank=4)
    for name, value in {
        "args.bf16": True,
        "args.weight_decay": 0.1,
        "args.gradient_checkpointing": True,
        "args.torch_compile": True,
        "args.max_grad_norm": 0.5,
        "eval_exits": (2,),
    }.items():
        assert operator.attrgetter(name)(trainer) == value
    for lora_alpha in (None, 3):
        config = prepared(lora_rank=4, lora_alpha=lora_alpha).model.peft_config["default"]
        assert (config.r, config.lora_alpha) == (4, lora_alpha or 8)


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


def test_threads_are_set(settings, prepared):
    before = torch.get_num_threads()
    try:
        prepared(threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "none.jsonl"}, "none.jsonl does not exist"),
        ({"model": "/nowhere/at/all"}, "there is no folder .*/nowhere/at/all"),
        ({"fixed_exits": [9]}, "fixed_exits names"),
        ({"exit_layer": 4}, "exit_layer is 4; it must be 1 to 3"),
        ({"eval_rows": 100}, "^--eval-rows is 100, but .*sums.jsonl has 100 rows: give fewer"),
        ({"eval_exits": [9], "eval_rows": 4}, r"eval_exits names \[9\]"),
        ({"scheduler": "greedy"}, "there is no scheduler 'greedy'; there are: linear"),
        ({"eval_data": "{data}"}, "eval_data is what is trained on"),
        ({"eval_data": "{data}", "eval_split": "test"}, "eval_split is for data sets of the hub"),
        ({"data": "{folder}/*.jsonl", "eval_data": "{data}"}, "of eval_data is trained on"),
        ({"fixed_exits": [1]}, "fixed_exits names 1, whose weight is 0"),
        ({"split": "validation"}, "split is for data sets of the hub; .* is a file"),
        ({"exits": [4], "curriculum": "all"}, "no exit before the last layer"),
        ({"completion": "{answer}"}, r"sums.jsonl:1 has the fields \['completion', 'prompt'\]"),
        ({"precision": "float16"}, "float16 needs a GPU"),
    ],
)
def test_bad_input_is_one_line_before_weights_are_loaded(settings, changes, message, monkeypatch):
    monkeypatch.delattr("layerskip.training.run.load_model")
    data = Path(settings["data"])
    changes = {
        name: value.replace("{data}", str(data)).replace("{folder}", str(data.parent))
        if isinstance(value, str)
        else value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=message) as error:
        run(settings, **changes)
    assert "\n" not in str(error.value)
    assert not Path(settings["output"]).exists()


def test_bad_rows_are_one_line(settings, tmp_path):
    """Rows to evaluate on are encoded first, because they are fewer."""
    with pytest.raises(ValueError, match=r"no row of .* has a label within max_length = 2"):
        run(settings, max_length=2)
    for name in ("train", "held_out"):
        rows = {"prompt": "1 + 1", "completion": " 2"}, {"question": "1 + 1"}
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "held_out.jsonl")}
    with pytest.raises(ValueError, match=r"held_out\.jsonl:2"):
        run(settings, **files)


def test_a_part_of_a_hub_data_set(settings, monkeypatch):
    calls = []

    def load_dataset(source, config, *, split):
        calls.append((source, config, split))
        return [{"prompt": "3 plus 4 is", "completion": "7"}] * 8

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    named = {"data": "some/sums", "eval_data": "some/sums", "eval_split": "test"}
    run(settings, **named, data_config="main", max_steps=1)
    assert calls == [("some/sums", "main", "train"), ("some/sums", "main", "test")]


def test_the_recipe_is_tried_before_the_rows_are_read(settings, monkeypatch):
    def refuse(*_):
        raise ValueError("this model's layers do not work so")

    monkeypatch.delattr("layerskip.training.run.load_rows")
    for part, changes in (("attach", {}), ("with_adapter", {"lora_rank": 2})):
        with monkeypatch.context() as patch:
            patch.setattr(f"layerskip.training.run.{part}", refuse)
            with pytest.raises(ValueError, match="layers do not work so") as caught:
                run(settings, **changes)
    if Path("/proc/self/fd").exists():  # no file is left open, though the frames are alive
        opened = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
        assert os.path.realpath(settings["data"]) not in opened
    assert caught.value.__traceback__
