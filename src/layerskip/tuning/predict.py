"""Costs and acceptance to tokens/s: the replay of every answer, priced. Pure functions."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from layerskip.tuning.acceptance import Continuation, replay
from layerskip.tuning.costs import Costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one pair of exit layer and draft tokens should give on these prompts.

    Attributes:
        tokens_per_s: new tokens after the first / seconds of decoding, over all prompts.
        speedup: over the plain decoding predicted from the same measurement.
        acceptance_rate: accepted / drafted; None where nothing was drafted.
        mean_accepted_length: tokens a round, the model's own included.
    """

    exit_layer: int
    draft_tokens: int
    tokens_per_s: float
    speedup: float
    acceptance_rate: float | None
    mean_accepted_length: float


def predict_plain(costs: Costs, continuations: Sequence[Continuation]) -> float:
    """Tokens/s of plain decoding on these prompts."""
    positions = [c.prompt_tokens + i for c in continuations for i in range(len(c.token_ids) - 1)]
    return len(positions) / _seconds(costs, positions, costs.plain_s)


def predict(
    costs: Costs, continuations: Sequence[Continuation], max_draft_tokens: int
) -> list[Prediction]:
    """Every exit and draft length, the fastest first.

    Args:
        costs: measured up to `max_draft_tokens` + 1 positions.
        continuations: with the agreement of all exits of `costs`.
        max_draft_tokens: draft lengths 1 to this.
    """
    plain = predict_plain(costs, continuations)
    found = [
        _predict_one(costs, continuations, e, d, plain)
        for e in costs.exits
        for d in range(1, max_draft_tokens + 1)
    ]
    return sorted(found, key=lambda p: p.tokens_per_s, reverse=True)


def _predict_one(
    costs: Costs,
    continuations: Sequence[Continuation],
    exit_layer: int,
    draft_tokens: int,
    plain_tokens_per_s: float,
) -> Prediction:
    positions: dict[int, list[int]] = defaultdict(list)  # where rounds of each length begin
    tokens = drafted = accepted = rounds = 0
    for c in continuations:
        produced = 1
        for step in replay(c, exit_layer, draft_tokens):
            # Where the answer ends inside a round, the whole draft was computed all the same.
            n = c.draft_length(produced, draft_tokens)
            positions[n].append(c.prompt_tokens + produced - 1)
            produced += len(step.tokens)
            tokens += len(step.tokens)
            drafted += step.drafted
            accepted += step.accepted
            rounds += 1
    seconds = sum(
        _seconds(costs, places, costs.round_s(exit_layer, n)) for n, places in positions.items()
    )
    return Prediction(
        exit_layer=exit_layer,
        draft_tokens=draft_tokens,
        tokens_per_s=tokens / seconds,
        speedup=tokens / seconds / plain_tokens_per_s,
        acceptance_rate=accepted / drafted if drafted else None,
        mean_accepted_length=tokens / rounds,
    )


def _seconds(costs: Costs, positions: Sequence[int], price: NDArray[np.float64]) -> float:
    """The sum of what a step costs at each position, given its price [C] at each context length."""
    return float(np.interp(positions, costs.contexts, price).sum())
