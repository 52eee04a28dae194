"""Costs, draft vocabulary and datastore for mode auto."""

import numpy as np
import pytest
import scripted

from layerskip.model import CheckpointSettings
from layerskip.tune.costs import Costs
from layerskip.tune.tune import datastore_with, datastore_without, draft_vocabulary, step_costs


def test_costs_in_plain_steps_at_the_middle_context():
    costs = Costs(
        contexts=[10, 20, 30],
        exits=[1, 3],
        plain_s=np.array([1.0, 2.0, 3.0]),
        head_s=np.array([0.1, 0.2, 0.3]),
        first_draft_s=np.ones((3, 2)),
        draft_step_s=np.array([[0.0, 0.0], [0.4, 0.8], [0.0, 0.0]]),
        verify_s=np.array([[[1.0, 1.0]] * 2, [[1.5, 1.8], [1.0, 1.5]], [[1.0, 1.0]] * 2]),
        round_overhead_s=np.array([0.0, -0.1, 0.0]),
    )
    found = step_costs(costs, 3, scripted.scripted_model([1]))
    assert (found.exit_layer, found.draft_step, found.head) == (3, 0.4, 0.1)
    assert found.passes == pytest.approx((1.0, 1.5))
    assert found.overhead == 0.0
    assert (found.dtype, found.weights, found.device) == ("float32", "16bit", "cpu")
    assert found.draft_tokens_scored == 300


def test_tokens_of_the_texts_come_before_those_of_the_checkpoint():
    settings = CheckpointSettings(end_tokens=(scripted.END,), draft_vocabulary=(50, 8, 51))
    model = scripted.scripted_model([1], settings=settings)
    assert draft_vocabulary([[8, 9, 9], [9, 8]], model) == (scripted.END, 9, 8, 50, 51)
    unknown = scripted.scripted_model(
        [1], settings=CheckpointSettings(end_tokens=(scripted.END, 10**6))
    )
    assert draft_vocabulary([[8, 8]], unknown)[:2] == (scripted.END, 8)
    bare = scripted.scripted_model([1])
    assert draft_vocabulary([[299, 1]], bare) == (scripted.END, 1, 299, 0, *range(2, 75))


def test_a_text_less_answers_that_are_in_it():
    first, second, short = tuple(range(10)), tuple(range(20, 30)), (7, 8)
    text = datastore_with([first, short, second, first], None)
    assert text == (*first, *short, *second)
    assert datastore_without([second, first, short], (50, *text, 51, *first, 52)) == (
        50,
        7,
        8,
        51,
        52,
    )
    assert datastore_without([first], None) is None
    assert datastore_with([short, first], text) == text  # each is there already
