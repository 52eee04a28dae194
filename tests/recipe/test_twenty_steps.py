"""The recipe really trains: the losses of all exits fall within twenty steps."""

import pytest
import torch

from causal_lms import LAYERS, batch_of, build
from layerskip.recipe import RecipeConfig, attach

STEPS = 20


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_losses_of_all_exits_fall(family):
    model, batch = build(family), batch_of()
    handle = attach(model, RecipeConfig(curriculum="all", exit_weighting="equal", p_max=0.2))
    exits = range(1, LAYERS + 1)
    before = handle.evaluate(exits, batch).loss_sums
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        handle.set_step(step, STEPS)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = handle.evaluate(exits, batch).loss_sums
    assert (after < 0.9 * before).all(), (before, after)
