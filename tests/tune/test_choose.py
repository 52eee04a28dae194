"""The choice, from written rows, and what mode auto is given of it."""

import dataclasses

import numpy as np
import pytest
import scripted

from layerskip.model import CheckpointSettings
from layerskip.tune.costs import Costs
from layerskip.tune.tune import (
    choose,
    choose_auto,
    datastore_with,
    datastore_without,
    draft_vocabulary,
    step_costs,
)


def row(speedup, interval, e=None, d=None):
    mode = "plain" if e is None else "self-speculative"
    return {
        "mode": mode,
        "exit_layer": e,
        "draft_tokens": d,
        "tokens_per_s": 50.0 * speedup,
        "speedup": speedup,
        "speedup_interval": list(interval),
    }


PLAIN = row(1.0, (1.0, 1.0))


def test_the_fastest_is_chosen():
    choice = choose([PLAIN, row(1.3, (1.2, 1.4), 4, 2), row(1.5, (1.3, 1.7), 8, 6)])
    assert (choice.mode, choice.exit_layer, choice.draft_tokens) == ("self-speculative", 8, 6)
    assert (choice.speedup, choice.speedup_interval) == (1.5, [1.3, 1.7])
    assert choice.tokens_per_s == 75.0
    assert choice.flags == "--mode self-speculative --exit-layer 8 --draft-tokens 6"
    assert "1.50x" in choice.reason


def test_plain_is_best_where_no_gain_is_certain():
    for interval in ((0.7, 0.9), (0.98, 1.1), (1.0, 1.2)):
        speedup = sum(interval) / 2
        choice = choose([PLAIN, row(speedup, interval, 4, 2), row(0.5, (0.4, 0.6), 8, 6)])
        assert (choice.mode, choice.exit_layer, choice.draft_tokens) == ("plain", None, None)
        assert (choice.speedup, choice.tokens_per_s) == (1.0, 50.0)
        assert choice.flags == "--mode plain"
        assert choice.reason.startswith("plain decoding is best here")
        assert "E=4, d=2" in choice.reason


def test_a_certain_gain_goes_before_a_faster_one_that_may_be_none():
    choice = choose([PLAIN, row(1.3, (0.97, 1.6), 4, 2), row(1.25, (1.1, 1.4), 8, 6)])
    assert (choice.exit_layer, choice.draft_tokens, choice.speedup) == (8, 6, 1.25)


AUTO = {"mode": "auto", "tokens_per_s": 60.0}


def test_auto_is_chosen_where_it_is_certainly_faster_and_faster_than_the_pair():
    for alone, early, pair, mode, exit_layer in (
        ((1.1, (1.05, 1.2)), (1.5, (1.3, 1.7)), None, "auto", 4),
        (
            (1.1, (1.05, 1.2)),
            (1.05, (1.01, 1.1)),
            None,
            "auto",
            None,
        ),  # n-grams bring what is gained
        ((1.0, (0.9, 1.1)), (1.2, (0.95, 1.4)), None, "plain", None),
        ((1.0, (0.9, 1.1)), (1.5, (1.3, 1.7)), (1.3, (1.2, 1.4)), "auto", 4),
        ((1.6, (1.4, 1.9)), (1.5, (1.3, 1.7)), (1.3, (1.2, 1.4)), "auto", None),
        ((1.0, (0.9, 1.1)), (1.2, (1.1, 1.3)), (1.3, (1.2, 1.4)), "self-speculative", 4),
        ((1.5, (0.9, 2.1)), (1.5, (1.3, 1.7)), None, "auto", 4),  # the faster one may be none
        ((1.0, (0.9, 1.1)), (1.4, (0.9, 1.9)), (1.3, (1.2, 1.4)), "self-speculative", 4),
    ):
        pairs = choose([PLAIN, row(*(pair or (1.05, (0.98, 1.1))), 4, 1)])
        rows = [{**row(*alone), **AUTO}, {**row(*early, 4), **AUTO}]
        choice = choose_auto(pairs, rows, {4: 1})
        assert (choice.mode, choice.exit_layer) == (mode, exit_layer)
        if mode != "auto":
            assert dataclasses.replace(choice, reason="") == dataclasses.replace(pairs, reason="")
            assert choice.reason.startswith(f"{pairs.reason}; mode auto with ")  # what runs else
        elif exit_layer is None:
            assert (choice.draft_tokens, choice.flags) == (None, "--draft-from n-gram")
            assert choice.reason.startswith("mode auto with n-grams is best here: 1.")
        else:
            assert (choice.draft_tokens, choice.flags) == (1, "--exit-layer 4")
            assert choice.speedup_interval == [1.3, 1.7]
            assert choice.reason.startswith("mode auto with E=4 is best here: 1.50x")
            assert ("E=4 with d=1 fixed comes to 1.30x" in choice.reason) == bool(pair)


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
