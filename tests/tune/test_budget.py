"""The exits and sweeps that are measured of a model, by its layers and the time of a plain step."""

import importlib
import types

import pytest

from layerskip.model import CheckpointSettings
from layerskip.tune.costs import SWEEPS
from layerskip.tune.tune import FEW_SWEEPS, TuneConfig, search_budget

module = importlib.import_module("layerskip.tune.tune")
CONFIG = TuneConfig(max_new_tokens=64, max_draft_tokens=16)


def model_of(n_layers, exit_layer=None):
    return types.SimpleNamespace(
        decoder=types.SimpleNamespace(layers=range(n_layers)),
        settings=CheckpointSettings(exit_layer=exit_layer),
    )


@pytest.fixture
def step_of(monkeypatch):
    def takes(seconds):
        monkeypatch.setattr(module, "_plain_step_s", lambda model, prompts: seconds)

    return takes


def test_a_slow_model_is_tuned_at_few_exits_and_its_own(step_of):
    step_of(0.3)
    budget = search_budget(model_of(32, exit_layer=8), range(20), CONFIG)
    assert budget.config.exit_layers == (1, 5, 8, 10, 14, 18, 22, 27, 31)
    assert budget.config.sweeps == FEW_SWEEPS
    step_of(0.01)
    fast = search_budget(model_of(32, exit_layer=8), range(20), CONFIG)
    assert (fast.config.exit_layers, fast.config.sweeps) == ((), SWEEPS)
    assert budget.seconds / 0.3 < fast.seconds / 0.01


def test_exits_of_the_config_and_of_few_layers_are_all_taken(step_of):
    step_of(0.3)
    config = TuneConfig(exit_layers=range(1, 32))
    budget = search_budget(model_of(32), range(20), config)
    assert (budget.config.exit_layers, budget.config.sweeps) == (tuple(range(1, 32)), SWEEPS)
    assert search_budget(model_of(8, exit_layer=8), range(20), CONFIG).config == CONFIG


def test_a_grid_takes_longer(step_of):
    step_of(0.3)
    seconds = [
        search_budget(
            model_of(4), range(5), TuneConfig(grid=grid, max_new_tokens=64, max_draft_tokens=16)
        ).seconds
        for grid in (False, True)
    ]
    assert seconds[1] - seconds[0] == pytest.approx(0.3 * 3 * 16 * 5 * 64)


def test_an_exit_that_cannot_draft_is_refused_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(module, "_plain_step_s", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match="exit layers for drafting are 1 to 3"):
        search_budget(model_of(4), range(5), TuneConfig(exit_layers=[99]))
