"""Which mode, exit layer and draft length, from what was asked and what the checkpoint says."""

import dataclasses

import pytest
from layerskip.decoding.policy import DEFAULT_DRAFT_TOKENS, MOST_DRAFT_TOKENS, choose, for_batch
from scripted import ScriptedDecoder
from tiny_decoders import PLAIN, speculative

from layerskip.decoding import MODES, Plan
from layerskip.model import CheckpointSettings, StepCosts

L = 12
SILENT = CheckpointSettings()
TUNED = CheckpointSettings(exit_layer=5, draft_tokens=7)
EXIT_ONLY = CheckpointSettings(exit_layer=5)
SHORT = CheckpointSettings(exit_layer=5, draft_vocabulary=(9, 3, 4))
MOST = MOST_DRAFT_TOKENS


def auto(exit_layer, draft_tokens, draft_vocabulary=None):
    return speculative(
        exit_layer,
        draft_tokens,
        draft_from="n-gram" if exit_layer is None else "both",
        adaptive=True,
        draft_vocabulary=draft_vocabulary,
    )


def early(exit_layer):
    return Plan(mode="early-exit", exit_layer=exit_layer)


@pytest.mark.parametrize(
    ("asked", "settings", "plan"),
    [
        # auto: n-grams, and the early exit where the checkpoint or the caller names one
        (("auto", None, None), SILENT, auto(None, MOST)),
        (("auto", None, None), CheckpointSettings(draft_tokens=17), auto(None, 17)),
        (("auto", None, None), TUNED, auto(5, MOST)),
        (("auto", None, None), EXIT_ONLY, auto(5, MOST)),
        (("auto", None, None), SHORT, auto(5, MOST, (9, 3, 4))),
        (("auto", 3, None), SILENT, auto(3, MOST)),
        (("auto", None, 2), SILENT, auto(None, 2)),
        (("auto", None, 0), TUNED, auto(5, 0)),
        (("auto", 3, 2), TUNED, auto(3, 2)),
        # each part of it alone
        (
            ("auto", None, None, "early-exit"),
            TUNED,
            dataclasses.replace(auto(5, MOST), draft_from="early-exit"),
        ),
        (("auto", None, None, "n-gram"), SHORT, auto(None, MOST)),
        (("auto", None, None, None, False), TUNED, dataclasses.replace(auto(5, 7), adaptive=False)),
        (("auto", None, None, None, None, ()), SHORT, auto(5, MOST)),
        (("auto", None, None, None, None, (1, 2)), SILENT, auto(L // 4, MOST, (1, 2))),
        (("self-speculative", None, None), SHORT, speculative(5, DEFAULT_DRAFT_TOKENS)),
        # plain, whatever the checkpoint says
        (("plain", None, None), SILENT, PLAIN),
        (("plain", None, None), TUNED, PLAIN),
        (("plain", None, None), CheckpointSettings(exit_layer=L + 1), PLAIN),
        # early exit
        (("early-exit", None, None), SILENT, early(L // 4)),
        (("early-exit", None, None), TUNED, early(5)),
        (("early-exit", 1, None), TUNED, early(1)),
        (("early-exit", L, None), SILENT, early(L)),
        # self-speculative
        (("self-speculative", None, None), SILENT, speculative(L // 4, DEFAULT_DRAFT_TOKENS)),
        (("self-speculative", None, None), TUNED, speculative(5, 7)),
        (("self-speculative", L, 0), TUNED, speculative(L, 0)),
        # what the caller names replaces what the checkpoint has wrong
        (("self-speculative", 4, None), CheckpointSettings(exit_layer=L + 1), speculative(4, 5)),
    ],
)
def test_plans(asked, settings, plan):
    assert choose(*asked, settings=settings, n_layers=L) == plan


def test_a_draft_text_is_searched_in_auto_or_where_it_is_named():
    texted = dataclasses.replace(TUNED, draft_text=(1, 2, 3))

    def text_of(mode, *switches, settings=texted, **named):
        return choose(
            mode, None, None, *switches, settings=settings, n_layers=L, **named
        ).draft_text

    assert text_of("auto") == text_of("auto", "n-gram") == (1, 2, 3)
    assert text_of("auto", draft_text=()) is None
    assert text_of("auto", draft_text=(7, 8), settings=SILENT) == (7, 8)
    assert text_of("auto", "early-exit") is None
    assert text_of("self-speculative", "both") is None
    assert text_of("self-speculative", "both", draft_text=(7, 8)) == (7, 8)
    for mode, source, message in (
        ("auto", "early-exit", "a draft text is searched for n-grams"),
        ("self-speculative", None, "a draft text is searched for n-grams"),
        ("plain", None, "plain decoding drafts nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            text_of(mode, source, draft_text=(7, 8))


def test_the_exit_that_the_checkpoint_names_is_trained_to_draft():
    for exit_layer, settings, trained in ((None, TUNED, True), (5, TUNED, True), (4, TUNED, False)):
        assert choose("auto", exit_layer, None, settings=settings, n_layers=L).trained == trained
    assert not choose("auto", 5, None, settings=SILENT, n_layers=L).trained
    assert not choose("auto", None, None, "n-gram", settings=TUNED, n_layers=L).trained


def test_the_exit_by_default_is_never_before_the_first_layer():
    assert choose("early-exit", None, None, settings=SILENT, n_layers=2) == early(1)


@pytest.mark.parametrize(
    ("asked", "settings", "message"),
    [
        (("fast", None, None), SILENT, "'fast' is unknown; there are: auto, " + ", ".join(MODES)),
        (("auto", 0, None), SILENT, "exit layer 0 is out of range: this model has 1 to 12"),
        (("auto", L + 1, None), SILENT, "exit layer 13 is out of range"),
        (("auto", -1, None), SILENT, "exit layer -1 is out of range"),
        (("auto", None, -1), SILENT, "draft tokens is -1"),
        (("plain", 3, None), SILENT, "plain decoding drafts nothing"),
        (("plain", None, 0), SILENT, "plain decoding drafts nothing"),
        (("early-exit", 3, 2), SILENT, "early exit drafts nothing"),
        (("auto", None, None, "text"), SILENT, "drafts from 'text' are unknown"),
        (("auto", 3, None, "n-gram"), SILENT, "drafts from n-grams have no exit layer"),
        (("auto", None, None, "n-gram", None, (1,)), SILENT, "or draft vocabulary"),
        (("early-exit", None, None, None, True), SILENT, "early exit drafts nothing"),
        (("auto", None, None), CheckpointSettings(exit_layer=L + 1), "exit layer is 13.*12 layers"),
    ],
)
def test_contradictions_are_refused(asked, settings, message):
    with pytest.raises(ValueError, match=message):
        choose(*asked, settings=settings, n_layers=L)


def measured(*passes):
    return StepCosts(
        dtype="float32",
        weights="16bit",
        device="cpu",
        kernels="pytorch",
        exit_layer=5,
        draft_step=0.3,
        draft_tokens_scored=300,
        head=0.1,
        passes=passes,
        overhead=0.0,
    )


@pytest.mark.parametrize(
    ("passes", "rows", "drafts"),
    [
        ((1.0, 1.0), 8, True),  # positions are free
        ((1.0, 2.0), 8, False),  # each costs as much as a step
        ((1.0, 1.0, 1.0, 1.0, 2.0), 2, True),  # free up to four
        ((1.0, 1.0, 1.0, 1.0, 2.0), 4, False),
    ],
)
def test_a_batch_drafts_where_its_verification_is_cheap(passes, rows, drafts):
    settings = dataclasses.replace(TUNED, costs=(measured(*passes),))
    alone = choose("auto", None, None, settings=settings, n_layers=L)
    plan = for_batch(alone, ScriptedDecoder([1]), settings, [0] * rows)
    assert plan == (dataclasses.replace(alone, draft_from="early-exit") if drafts else PLAIN)
    assert plan.adaptive == drafts


def test_a_batch_drafts_where_its_head_is_short():
    settings = dataclasses.replace(
        TUNED, costs=(dataclasses.replace(measured(1.0, 1.3), head=0.9),)
    )
    alone = choose("auto", None, None, settings=settings, n_layers=L)
    short = dataclasses.replace(alone, draft_vocabulary=(0, 1))
    decoder = ScriptedDecoder([1])
    assert (
        for_batch(dataclasses.replace(alone, draft_vocabulary=None), decoder, settings, [0] * 2)
        == PLAIN
    )
    assert for_batch(short, decoder, settings, [0] * 2).draft_vocabulary == (0, 1)


def test_a_batch_of_long_prompts_is_plain_where_half_the_layers_draft():
    """A draft reads the keys and values of its layers for every token."""
    cost = dataclasses.replace(measured(1.0, 1.3), exit_layer=2)
    settings = dataclasses.replace(TUNED, exit_layer=2, costs=(cost,))
    alone = choose("auto", None, None, settings=settings, n_layers=L)
    assert for_batch(alone, ScriptedDecoder([1]), settings, [0] * 2) != PLAIN
    assert for_batch(alone, ScriptedDecoder([1]), settings, [10_000] * 2) == PLAIN


def test_a_batch_without_an_exit_is_plain():
    alone = choose("auto", None, None, settings=SILENT, n_layers=L)
    assert for_batch(alone, ScriptedDecoder([1]), SILENT, [8, 8]) == PLAIN


def test_the_exit_with_the_last_word():
    assert early(3).final_exit(L) == 3
    assert speculative(3, 2).final_exit(L) == L
    assert PLAIN.final_exit(L) == L


def test_options_choose_the_same_plan_again():
    for settings in (SILENT, TUNED, SHORT):
        plan = choose("auto", None, None, settings=settings, n_layers=L)
        options = [plan.options[name] for name in ARGUMENTS]
        assert choose(*options, settings=SILENT, n_layers=L) == plan


ARGUMENTS = ("mode", "exit_layer", "draft_tokens", "draft_from", "adaptive", "draft_vocabulary")
