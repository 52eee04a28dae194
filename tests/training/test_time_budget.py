"""Runs that end with the minutes given, by a clock that every training step moves by a second."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from layerskip.training import LayerSkipTrainer, TrainConfig, callbacks, train
from layerskip.training import run as training_run
from layerskip.training.callbacks import read_log

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def run(model_folder, data_file, tmp_path, monkeypatch):
    """A run of at most 100 steps: (its result, the learning rate of each step over the highest)."""
    clock, plain = Clock(), LayerSkipTrainer.training_step
    monkeypatch.setattr(callbacks, "time", clock)

    def start(name="out", *, fail_at=None, **changes):
        def step(self, *args, **kwargs):
            if self.state.global_step + 1 == fail_at:
                raise KeyboardInterrupt
            clock.now += 1
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(LayerSkipTrainer, "training_step", step)
        values = {
            "model": model_folder,
            "data": data_file,
            "output": str(tmp_path / name),
            "batch_size": 4,
            "rotation": 2,
            "max_steps": 100,
            "learning_rate": 1e-3,
            "log_steps": 1,
            "device": "cpu",
        }
        result = train(TrainConfig.from_mapping({**values, **changes}))
        logs = read_log(result.output / "train_log.jsonl")
        return result, [log["learning_rate"] / 1e-3 for log in logs if "loss" in log]

    return start


def cosine(share):
    return (1 + math.cos(math.pi * share)) / 2


def test_the_schedule_ends_with_the_time(run):
    result, rates = run(max_minutes=10 / 60)
    assert result.steps == 10
    assert rates == pytest.approx([cosine(n / 10) for n in range(10)])


def test_the_steps_end_it_where_they_come_first(run):
    result, rates = run(max_minutes=10, max_steps=5)
    assert result.steps == 5
    assert rates == pytest.approx([cosine(n / 5) for n in range(5)])


def test_the_warm_up_counts_steps(run):
    _, rates = run(max_minutes=10 / 60, warmup_steps=4)
    assert rates[:4] == pytest.approx([0, 0.25, 0.5, 0.75])
    # From there on the time that is gone: 4 of 10 seconds are 40% of what follows the warm-up.
    expected = [cosine(int(96 * n / 10) / 96) for n in range(4, 10)]
    assert rates[4:] == pytest.approx(expected)


def test_a_resume_has_the_time_that_is_left(run, tmp_path):
    whole, rates = run(max_minutes=10 / 60, save_steps=4)
    with pytest.raises(KeyboardInterrupt):
        run("half", max_minutes=10 / 60, save_steps=4, fail_at=7)
    half, resumed_rates = run("half", max_minutes=10 / 60, save_steps=4, resume=True)
    assert half.steps == 10
    assert resumed_rates == pytest.approx(rates)
    one, other = (load_file(Path(r.output) / "model.safetensors") for r in (whole, half))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_is_over_has_nothing_to_prepare_for_weights_in_parts(run, monkeypatch):
    run(max_minutes=5 / 60)
    make = training_run._trainer

    def sharded(*settings):
        trainer = make(*settings)
        trainer.is_fsdp_enabled = True
        return trainer

    monkeypatch.setattr(training_run, "_trainer", sharded)
    with pytest.raises(
        ValueError, match="that of the last step: go on with --resume on one device"
    ):
        run(max_minutes=5 / 60, resume=True)


def test_more_minutes_go_on_with_a_run_that_has_used_its_own(run):
    first, _ = run(max_minutes=5 / 60)
    weights = load_file(Path(first.output) / "model.safetensors")
    again, _ = run(max_minutes=5 / 60, resume=True)  # takes no further step
    assert again.steps == first.steps == 5
    later = load_file(Path(again.output) / "model.safetensors")
    assert all(torch.equal(weights[name], later[name]) for name in weights)
    result, rates = run(max_minutes=10 / 60, resume=True)
    assert result.steps == 10
    assert rates[6:] == pytest.approx([cosine(n / 10) for n in range(6, 10)])


def test_a_run_that_began_without_a_budget_can_get_one(run):
    with pytest.raises(KeyboardInterrupt):
        run(save_steps=4, fail_at=7)
    result, _ = run(save_steps=4, max_minutes=10 / 60, resume=True)
    assert result.steps == 4 + 10
