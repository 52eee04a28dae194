"""Rounds of scripted answers, counted by hand."""

import dataclasses

from reports import scripted_report
from scripted import END, scripted_model

from layerskip.lens import Round, rounds


def test_rounds_of_a_known_pattern():
    """Tokens 10-17 after a prompt of two; the exit misses the third and the sixth (it says one more)."""
    report = scripted_report(range(10, 18), misses={2, 5}, draft_tokens=3)
    assert report.rounds == (
        Round(position=3, accepted=(11,), rejected=(13, 13), own=12),
        Round(position=5, accepted=(13, 14), rejected=(16,), own=15),
        Round(position=8, accepted=(16,), rejected=(), own=17),
    )
    assert [one.corrected for one in report.rounds] == [True, True, False]
    covered = [t for one in report.rounds for t in (*one.accepted, one.own)]
    assert covered == report.generation.token_ids[1:]


def test_an_end_inside_a_draft_leaves_no_own_token():
    made = scripted_model([10, 11, END, 12, 13]).generate(
        [0], mode="self-speculative", exit_layer=2, draft_tokens=4
    )
    assert list(rounds(made.steps, 1)) == [
        Round(position=2, accepted=(11, END), rejected=(), own=None)
    ]


def test_who_drafted():
    for from_exit, names in (
        (3, "layers 1 to 2"),
        (2, "layers 1 to 2 and n-grams"),
        (0, "n-grams"),
    ):
        report = scripted_report(range(10, 18), draft_tokens=3)
        (step,) = (step for step in report.generation.steps if step.drafted == 3)
        sources = ("early-exit",) * from_exit + ("n-gram",) * (3 - from_exit)
        steps = [dataclasses.replace(step, sources=sources)]
        changed = dataclasses.replace(report.generation, steps=steps)
        assert dataclasses.replace(report, generation=changed).drafters == names


def test_report_as_json():
    document = scripted_report(range(10, 18), misses={2, 5}).to_dict()
    assert document["rounds"][0] == {
        "position": 3,
        "accepted": (11,),
        "rejected": (13, 13),
        "own": 12,
        "corrected": True,
    }
    third = document["positions"][3]
    assert (third["position"], third["token_id"], third["symbol"]) == (4, 12, "#12")
    assert (third["in_answer"], third["saturation_layer"]) == (True, 4)
    assert [layer["agrees"] for layer in third["layers"]] == [False, False, False, True]
    assert [layer["top"][0]["token_id"] for layer in third["layers"]] == [13, 13, 13, 12]
