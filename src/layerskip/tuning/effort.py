"""How much is to be measured, and about how long that takes: less where a model is slow."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from layerskip.decoding import LayerSkipModel
from layerskip.tuning.costs import ANCHORS, SWEEPS

SLOW_STEP_S = 0.05  # from here on all exits of a deep model would take an hour
FEW_EXITS = 8
FEW_SWEEPS = 2
_TRIED_TOKENS, _TRIED_PROMPT = 5, 32
# In plain steps and about, as everything here: a draft with its verification, between one token and
# six; how often all answers are made, for reading, confirming and in mode auto; whole rounds of a sweep.
_STEPS_OF_A_PAIR, _TIMES_ANSWERED, _OTHER_STEPS = 2.5, 10, 40
_CONTEXTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """What to tell `tune`.

    Attributes:
        step_s: seconds of a plain step, tried on a few tokens.
        exits: layers run; None for all.
        sweeps: how often every part is timed.
        seconds: what tuning takes then, about.
    """

    step_s: float
    exits: list[int] | None
    sweeps: int
    seconds: float


def effort_for(
    model: LayerSkipModel,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    max_draft_tokens: int,
    exits: Sequence[int] | None = None,
    grid: bool = False,
) -> Effort:
    """Time a plain step, and settle on exits and sweeps; arguments as of `tune`.

    Where a step takes longer than `SLOW_STEP_S` and nobody named exits, they are about `FEW_EXITS`,
    evenly spread, and the checkpoint's own, which are timed `FEW_SWEEPS` times.
    """
    step_s, n_layers = _plain_step_s(model, prompts), len(model.decoder.layers)
    chosen, sweeps = None if exits is None else list(exits), SWEEPS
    if chosen is None and step_s > SLOW_STEP_S and n_layers > FEW_EXITS + 1:
        spread = {round(e) for e in np.linspace(1, n_layers - 1, FEW_EXITS)}
        own = model.settings.exit_layer
        chosen = sorted(spread | ({own} if own is not None and own < n_layers else set()))
        sweeps = FEW_SWEEPS
    n_exits = n_layers - 1 if chosen is None else len(chosen)
    pairs = 2 * n_exits + ANCHORS * (max_draft_tokens + 1)
    of_costs = _CONTEXTS * (sweeps + 1) * (_STEPS_OF_A_PAIR * pairs + _OTHER_STEPS)
    answered = _TIMES_ANSWERED + (n_exits * max_draft_tokens if grid else 0)
    steps = of_costs + answered * len(prompts) * max_new_tokens
    return Effort(step_s=step_s, exits=chosen, sweeps=sweeps, seconds=step_s * steps)


def _plain_step_s(model: LayerSkipModel, prompts: Sequence[Any]) -> float:
    """Of the first prompt with a token; 0 where none has: `tune` says what is wrong with them."""
    room = model.decoder.architecture.max_context - _TRIED_TOKENS
    ids = next(filter(None, (model.tokenize(p)[:_TRIED_PROMPT] for p in prompts)), [])
    if not 0 < len(ids) < room:
        return 0.0
    for _ in range(2):  # the first one warms up
        tried = model.generate(ids, mode="plain", max_new_tokens=_TRIED_TOKENS, ignore_eos=True)
    return tried.decode_s / (_TRIED_TOKENS - 1)
