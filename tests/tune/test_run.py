"""The whole of tuning on tiny models, and on a machine whose times are written down."""

import importlib
import json

import pytest
import scripted
from tiny_decoders import model_of, random_prompt, tiny_decoder

from layerskip import LayerSkipModel
from layerskip.model import CheckpointSettings
from layerskip.tune.plots import plot_tuning
from layerskip.tune.tune import Choice, tune
from timed import TimedDecoder


def timed_model(monkeypatch, *, misses=(), **times):
    """Four layers of a second each and a head of half a second, unless told otherwise."""
    decoder = TimedDecoder(range(40, 100), misses=misses, prompt_tokens=6, max_context=400, **times)
    decoder.keep_time(monkeypatch)
    return model_of(decoder)


module = importlib.import_module("layerskip.tune.tune")
PROMPTS = [[1] * 6, [2] * 6, [3] * 6]
PLAIN = Choice(
    mode="plain",
    exit_layer=None,
    draft_tokens=None,
    tokens_per_s=1.0,
    speedup=1.0,
    speedup_interval=[1.0, 1.0],
    reason="",
)


def test_a_draft_that_is_always_right_is_chosen_as_predicted(monkeypatch):
    """Plain: 4.5 s a token. E=1, d: (d+1) layers and d heads, then 3 layers and a head, d+1 tokens."""
    monkeypatch.setattr(module, "choose_auto", lambda pairs, rows, lengths: pairs)
    tuning = tune(timed_model(monkeypatch), PROMPTS, max_new_tokens=31, max_draft_tokens=4)
    choice = tuning.choice
    assert [row["exit_layer"] for row in tuning.auto] == [None, None, 1]
    assert (choice.mode, choice.exit_layer, choice.draft_tokens) == ("self-speculative", 1, 4)
    assert tuning.predicted_plain_tokens_per_s == pytest.approx(1 / 4.5)
    seconds = 5 + 4 * 0.5 + 3 + 0.5
    assert tuning.predictions[0].tokens_per_s == pytest.approx(5 / seconds)
    assert choice.tokens_per_s == pytest.approx(5 / seconds)
    assert choice.speedup == pytest.approx(4.5 * 5 / seconds)
    plain, *others = tuning.confirmed
    assert plain["mode"] == "plain"
    assert len(others) == 3
    for row in others:
        assert row["error_of_tokens_per_s"] == pytest.approx(0.0, abs=1e-9)
        assert row["error_of_speedup"] == pytest.approx(0.0, abs=1e-9)
        assert row["acceptance_rate"] == 1.0
    assert [row["agreement"] for row in tuning.exits] == [1.0] * 3


def test_plain_is_chosen_where_drafts_are_wrong(monkeypatch):
    model = timed_model(monkeypatch, misses=range(100))
    tuning = tune(model, PROMPTS, max_new_tokens=20, max_draft_tokens=3)
    assert tuning.choice.mode == "plain"
    assert "plain decoding is best here" in tuning.choice.reason
    assert all(p.speedup < 1 for p in tuning.predictions)
    assert [row["agreement"] for row in tuning.exits] == [0.0] * 3
    assert tuning.record()["mode"] == "plain"
    assert [row["mode"] for row in tuning.auto] == [
        "plain",
        "auto",
        *["auto"] * (len(tuning.auto) - 2),
    ]


def test_mode_auto_is_tried_where_no_pair_gains(monkeypatch):
    monkeypatch.setattr(module, "choose", lambda rows: PLAIN)
    model = timed_model(monkeypatch)
    tuning = tune(model, PROMPTS, max_new_tokens=41, max_draft_tokens=4)
    alone, *early = tuning.auto[1:]
    assert (alone["exit_layer"], alone["speedup"]) == (None, pytest.approx(1.0))
    assert [row["exit_layer"] for row in early] == list(
        dict.fromkeys(row["exit_layer"] for row in tuning.confirmed[1:])
    )
    choice, fastest = tuning.choice, max(early, key=lambda row: row["speedup"])
    assert (choice.mode, choice.exit_layer) == ("auto", fastest["exit_layer"])
    assert choice.speedup == fastest["speedup"] > 1.5
    assert choice.draft_tokens in range(1, 5)
    assert tuning.step_costs.exit_layer == choice.exit_layer
    assert (fastest["draft_from"], fastest["adaptive"]) == ("both", True)
    assert fastest["drafted"] >= fastest["accepted"] > 0
    assert (alone["draft_from"], alone["adaptive"]) == ("n-gram", True)


def test_mode_auto_is_chosen_where_it_drafts_further_than_the_pair(monkeypatch):
    tuning = tune(timed_model(monkeypatch), PROMPTS, max_new_tokens=31, max_draft_tokens=2)
    choice, auto = tuning.choice, tuning.auto[-1]
    assert (choice.mode, choice.exit_layer, choice.draft_tokens) == ("auto", 2, 2)
    assert choice.speedup == auto["speedup"] > tuning.confirmed[1]["speedup"]
    # What auto was measured with is what it finds in a checkpoint: 31 tokens at most there, too.
    assert auto["draft_tokens"] == 31


def test_answers_of_an_earlier_tuning_are_not_searched(monkeypatch):
    options = {"max_new_tokens": 31, "max_draft_tokens": 2}
    model = timed_model(monkeypatch)
    once = tune(model, PROMPTS, **options)
    taught = model.with_settings(CheckpointSettings(draft_text=(7, 8, 9, *once.datastore)))
    tried = []
    make = LayerSkipModel.with_settings
    monkeypatch.setattr(
        LayerSkipModel, "with_settings", lambda self, to: tried.append(to) or make(self, to)
    )
    again = tune(taught, PROMPTS, **options)
    assert {settings.draft_text for settings in tried} == {(7, 8, 9)}
    assert again.datastore == (7, 8, 9, *once.datastore)


def test_plain_is_chosen_where_right_drafts_cost_too_much(monkeypatch):
    """Plain: 104 s a token. E=3, d=1: 6 + 100 to draft, 7 + 100 to verify, for two tokens."""
    model = timed_model(monkeypatch, head=100.0, row=6.0)
    tuning = tune(model, PROMPTS, max_new_tokens=21, max_draft_tokens=3, exit_layers=[3])
    assert tuning.predictions[0].tokens_per_s == pytest.approx(2 / 213)
    assert tuning.choice.mode == "plain"
    assert tuning.confirmed[1]["acceptance_rate"] == 1.0


def test_the_grid_runs_every_pair_as_predicted(monkeypatch):
    model = timed_model(monkeypatch, misses=range(3, 100, 3))
    tuning = tune(
        model, PROMPTS, max_new_tokens=24, max_draft_tokens=3, exit_layers=[3, 1], grid=True
    )
    pairs = {(row["exit_layer"], row["draft_tokens"]) for row in tuning.grid[1:]}
    assert pairs == {(e, d) for e in (1, 3) for d in (1, 2, 3)}
    for row in tuning.grid:
        assert row["error_of_tokens_per_s"] == pytest.approx(0.0, abs=1e-9)
    fastest = max(tuning.grid[1:], key=lambda row: row["speedup"])
    assert tuning.confirmed[1]["speedup"] == fastest["speedup"]
    assert (tuning.choice.exit_layer, tuning.choice.draft_tokens) == (1, 2)


def test_a_tuning_of_a_real_decoder_is_one_valid_document_with_pictures(tmp_path):
    decoder = tiny_decoder("llama3.1")
    model = model_of(decoder)
    prompts = [random_prompt(decoder, 5 + i, i) for i in range(3)]
    said = []
    tuning = tune(
        model,
        prompts,
        max_new_tokens=12,
        max_draft_tokens=2,
        grid=True,
        progress=lambda what, done, total: said.append((what, done, total)),
    )
    result = json.loads(json.dumps(tuning.to_dict()))
    assert result["prompts"] == 3
    assert len(result["predictions"]) == 3 * 2
    assert len(result["exits"][0]["accepted_by_position"]) == 2
    for row in result["confirmed"][1:]:
        # In float32 the replay is the real run.
        predicted = next(
            p
            for p in result["predictions"]
            if (p["exit_layer"], p["draft_tokens"]) == (row["exit_layer"], row["draft_tokens"])
        )
        assert row["acceptance_rate"] == predicted["acceptance_rate"]
        assert row["mean_accepted_length"] == predicted["mean_accepted_length"]
        assert row["identical_to_plain"] == 1.0
    phases = list(dict.fromkeys(what for what, _, _ in said))
    assert len(phases) == 4
    for phase in phases:
        done = [(d, total) for what, d, total in said if what == phase]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]
    pictures = plot_tuning(tuning, tmp_path / "report")
    assert {path.name for path in pictures} == {
        "map.png",
        "agreement.png",
        "predicted_and_measured.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)


def test_answers_too_short_to_decode_are_refused():
    decoder = scripted.ScriptedDecoder([7], max_context=400)
    model = model_of(decoder, end_tokens=(7,))
    with pytest.raises(ValueError, match="0 of 2 prompts fit into the context and have an answer"):
        tune(model, [[1], [2]])


def test_exits_that_cannot_draft_are_refused():
    for exits in ([4], [2, 9]):
        with pytest.raises(ValueError, match="1 to 3"):
            tune(scripted.scripted_model(range(9)), [[1], [2]], exit_layers=exits)


def test_what_was_left_out_is_told(monkeypatch):
    prompts = [*PROMPTS, [], [1] * 500]
    tuning = tune(timed_model(monkeypatch), prompts, max_new_tokens=8, max_draft_tokens=1)
    assert (tuning.prompts, tuning.skipped) == (3, 2)
    assert tuning.to_dict()["skipped"] == 2


def test_options_that_leave_nothing_to_tune(monkeypatch):
    for option in ({"max_new_tokens": 1}, {"max_draft_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is ., it has to be"):
            tune(timed_model(monkeypatch), PROMPTS, **option)
