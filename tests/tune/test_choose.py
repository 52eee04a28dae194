"""The choice, from written rows."""

import dataclasses

from layerskip.tune.tune import choose, choose_auto


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
