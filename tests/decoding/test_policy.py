"""Which mode, exit layer and draft length, from what was asked and what the checkpoint says."""

import pytest

from layerskip.decoding import MODES, Plan
from layerskip.decoding.policy import DEFAULT_DRAFT_TOKENS, choose
from layerskip.model import Settings

L = 12
SILENT = Settings()
TUNED = Settings(exit_layer=5, draft_tokens=7)
EXIT_ONLY = Settings(exit_layer=5)
PLAIN = Plan(mode="plain")


def speculative(exit_layer, draft_tokens):
    return Plan(mode="self-speculative", exit_layer=exit_layer, draft_tokens=draft_tokens)


def early(exit_layer):
    return Plan(mode="early-exit", exit_layer=exit_layer)


@pytest.mark.parametrize(
    ("asked", "settings", "plan"),
    [
        # auto: self-speculative where the checkpoint or the caller names an exit or a draft length
        (("auto", None, None), SILENT, PLAIN),
        (("auto", None, None), Settings(draft_tokens=7), PLAIN),
        (("auto", None, None), TUNED, speculative(5, 7)),
        (("auto", None, None), EXIT_ONLY, speculative(5, DEFAULT_DRAFT_TOKENS)),
        (("auto", 3, None), SILENT, speculative(3, DEFAULT_DRAFT_TOKENS)),
        (("auto", 3, None), TUNED, speculative(3, 7)),
        (("auto", None, 2), SILENT, speculative(L // 4, 2)),
        (("auto", None, 0), TUNED, speculative(5, 0)),
        (("auto", 3, 2), TUNED, speculative(3, 2)),
        # plain, whatever the checkpoint says
        (("plain", None, None), SILENT, PLAIN),
        (("plain", None, None), TUNED, PLAIN),
        (("plain", None, None), Settings(exit_layer=L + 1), PLAIN),
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
        (("self-speculative", 4, None), Settings(exit_layer=L + 1), speculative(4, 5)),
    ],
)
def test_plans(asked, settings, plan):
    assert choose(*asked, settings=settings, n_layers=L) == plan


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
        (("plain", 3, None), SILENT, "plain decoding has no exit layer"),
        (("plain", None, 0), SILENT, "plain decoding has no exit layer and no draft tokens"),
        (("early-exit", 3, 2), SILENT, "early exit has no draft tokens"),
        (("auto", None, None), Settings(exit_layer=L + 1), "assistant_early_exit is 13.*12 layers"),
    ],
)
def test_contradictions_are_refused(asked, settings, message):
    with pytest.raises(ValueError, match=message):
        choose(*asked, settings=settings, n_layers=L)
