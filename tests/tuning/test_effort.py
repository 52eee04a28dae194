"""How much is measured of a model of so many layers whose plain step takes so long."""

import types

import pytest

from layerskip.model import CheckpointSettings
from layerskip.tune import tune as effort_module
from layerskip.tune.costs import SWEEPS
from layerskip.tune.tune import FEW_SWEEPS, effort_for

HOW = {"max_new_tokens": 64, "max_draft_tokens": 16}


def model_of(n_layers, exit_layer=None):
    return types.SimpleNamespace(
        decoder=types.SimpleNamespace(layers=range(n_layers)),
        settings=CheckpointSettings(exit_layer=exit_layer),
    )


@pytest.fixture
def step_of(monkeypatch):
    def takes(seconds):
        monkeypatch.setattr(effort_module, "_plain_step_s", lambda model, prompts: seconds)

    return takes


def test_a_slow_model_is_tuned_at_few_exits_and_its_own(step_of):
    step_of(0.3)
    found = effort_for(model_of(32, exit_layer=8), range(20), **HOW)
    assert found.exits == [1, 5, 8, 10, 14, 18, 22, 27, 31]
    assert found.sweeps == FEW_SWEEPS
    step_of(0.01)
    fast = effort_for(model_of(32, exit_layer=8), range(20), **HOW)
    assert (fast.exits, fast.sweeps) == (None, SWEEPS)
    assert found.seconds / 0.3 < fast.seconds / 0.01


def test_exits_that_were_named_are_all_taken(step_of):
    step_of(0.3)
    found = effort_for(model_of(32), range(20), exits=range(1, 32), **HOW)
    assert (found.exits, found.sweeps) == (list(range(1, 32)), SWEEPS)


def test_few_layers_are_few_exits(step_of):
    step_of(0.3)
    assert effort_for(model_of(8, exit_layer=8), range(20), **HOW).exits is None


def test_every_pair_for_real_takes_longer(step_of):
    step_of(0.3)
    seconds = [
        effort_for(model_of(4), range(5), grid=grid, **HOW).seconds for grid in (False, True)
    ]
    assert seconds[1] - seconds[0] == pytest.approx(0.3 * 3 * 16 * 5 * 64)
