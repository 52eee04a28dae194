"""Rows of an evaluation, and their figures in JSON."""

import pytest
from scripted import scripted_model

from layerskip.bench.bench import Metric, Row, rows_of
from layerskip.bench.report import plot_exits
from layerskip.decoding import DecodingConfig
from layerskip.model import CheckpointSettings

PLAIN = DecodingConfig(mode="plain")


def model(n_layers=30, **settings):
    model = scripted_model([1], settings=CheckpointSettings(**settings))
    model.decoder.layers = [None] * n_layers
    return model


def test_every_mode_at_every_exit_once():
    for modes, exits, drafts, settings, expected in (
        (["plain"], [3, 8], (), {}, [("plain", None, None)]),
        (["early-exit"], [3, 8], (4,), {}, [("early-exit", 3, None), ("early-exit", 8, None)]),
        (["early-exit"], None, (), {}, [("early-exit", e, None) for e in (8, 15, 23, 30)]),
        (["self-speculative"], None, (4,), {"exit_layer": 6}, [("self-speculative", 6, 4)]),
        (["self-speculative"], None, (4, "n-gram"), {}, [("self-speculative", None, 4)]),
        (
            ["auto", "plain"],
            None,
            (),
            {},
            [("self-speculative", None, 31), ("plain", None, None)],
        ),
        (["auto"], [9], (4,), {}, [("self-speculative", 9, 4)]),
        (  # n-grams have no exit; those asked for are early exit's
            ["early-exit", "self-speculative"],
            [3, 9],
            (4, "n-gram"),
            {},
            [("early-exit", 3, None), ("early-exit", 9, None), ("self-speculative", None, 4)],
        ),
    ):
        found = [row.config for row in rows_of(model(**settings), modes, exits, *drafts)]
        assert [(p.mode, p.exit_layer, p.draft_tokens) for p in found] == expected


def test_auto_is_a_row_of_its_own_name():
    rows = rows_of(model(exit_layer=8), ["auto", "self-speculative"])
    assert [(row.mode, row.to_dict()["adaptive"]) for row in rows] == [
        ("auto", True),
        ("self-speculative", False),
    ]


def test_rows_for_json():
    config = DecodingConfig(
        mode="self-speculative", draft_from="early-exit", exit_layer=3, draft_tokens=2
    )
    row = Row(config, "self-speculative", drafted=8, accepted=6)
    row.results["a"] = {"acc": Metric(0.5, float("nan"), True), "ppl": Metric(float("inf"))}
    assert Row(PLAIN, "plain").to_dict()["draft_from"] is None
    assert row.to_dict() == {
        "mode": "self-speculative",
        "exit_layer": 3,
        "draft_tokens": 2,
        "draft_from": "early-exit",
        "adaptive": False,
        "acceptance_rate": 0.75,
        "results": {
            "a": {
                "acc": {"value": 0.5, "stderr": None, "higher_is_better": True},
                "ppl": {"value": None, "stderr": None, "higher_is_better": None},
            }
        },
    }


def test_names_with_dollars_are_no_formulas():
    row = Row(PLAIN, "plain")
    row.results["cost_$100_vs_$200.txt"] = {"words_$_$": Metric(1.0)}
    assert plot_exits([row], 30).startswith(b"\x89PNG")


def test_a_picture_needs_a_figure():
    with pytest.raises(ValueError, match="have given no figure that could be drawn"):
        plot_exits([Row(PLAIN, "plain")], 30)
