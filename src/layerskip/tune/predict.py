"""Predicted speed of every exit layer and draft length, from measured costs and greedy answers.

While a draft is right, the early exit sees the model's own tokens. So the positions of a greedy answer
where an exit agrees with the model determine which drafts are accepted, for every draft length. One pass
over the answer gives them for all exits; a replay of the answer's rounds, with the measured costs of
each, gives tokens/s.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from layerskip.decoding import Step, iter_exit_hidden_states
from layerskip.decoding.drafters import EarlyExit
from layerskip.decoding.generate import StoppingCriteria
from layerskip.model import Decoder
from layerskip.tune.costs import Costs

_UNKNOWN = -1  # the model's token after the answer's end, which is always cut off
_CHUNK = 64  # positions whose logits are computed at once: bounds their memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """A greedy answer, and the agreement of each exit along it.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        token_ids: the answer, N tokens, at least 2.
        limit: maximum length of the answer, which drafts never exceed.
        agreement: exit -> N - 1 booleans: entry i is True if this exit's most likely token after the
            prompt and tokens 0 to i is token i + 1. (Token 0 comes from the prompt's pass.)
    """

    prompt_tokens: int
    token_ids: list[int]
    limit: int
    agreement: dict[int, list[bool]]

    def draft_length(self, produced: int, draft_tokens: int) -> int:
        """Return the number of tokens that a round after so many new tokens drafts."""
        return min(draft_tokens, self.limit - produced - 1)


@torch.inference_mode()
def read_agreement(
    decoder: Decoder,
    prompt: Sequence[int],
    answer: list[int],
    exits: Sequence[int],
    limit: int,
) -> Continuation:
    """Compare every exit with a greedy answer of the whole model, in one pass over it.

    Args:
        decoder: the model that gave the answer.
        prompt: its token ids.
        answer: token ids of a plain, greedy answer, at least 2.
        exits: layers run, each 1 to L.
        limit: the `max_new_tokens` of the answer.
    """
    criteria = StoppingCriteria.of(decoder, prompt, limit)
    expected = torch.tensor(answer[1:], device=decoder.device)
    agreement: dict[int, list[bool]] = {exit_layer: [] for exit_layer in sorted(set(exits))}
    ids = torch.tensor([[*prompt, *answer[:-1]]], device=decoder.device)
    # The capacity is that of the answer's own cache.
    for first, exit_layer, hidden in iter_exit_hidden_states(
        decoder, ids, exits, criteria.capacity
    ):
        if first + hidden.shape[1] <= len(prompt):
            continue
        marks = agreement[exit_layer]
        for rows in hidden[:, max(len(prompt) - first, 0) :].split(_CHUNK, dim=1):
            tokens = decoder.logits(rows).argmax(dim=-1)[0]
            marks += (tokens == expected[len(marks) : len(marks) + len(tokens)]).tolist()
    return Continuation(
        prompt_tokens=len(prompt),
        token_ids=answer,
        limit=criteria.max_new_tokens,
        agreement=agreement,
    )


def agreement_rate(continuations: Sequence[Continuation], exit_layer: int) -> float:
    """Return the share of positions at which an exit agrees with the model's next token."""
    marks = [mark for c in continuations for mark in c.agreement[exit_layer]]
    return sum(marks) / len(marks)


def replay(continuation: Continuation, exit_layer: int, draft_tokens: int) -> list[Step]:
    """Return the rounds in which self-speculative decoding gives this answer after its first token.

    They are those of a real greedy run, as far as rounding does not change a most likely token.
    """
    marks, n = continuation.agreement[exit_layer], len(continuation.token_ids)
    answer = (*continuation.token_ids, _UNKNOWN)
    rounds = []
    produced = 1
    while produced < n:
        drafted = continuation.draft_length(produced, draft_tokens)
        agreed = marks[produced - 1 : produced - 1 + drafted]
        accepted = [*agreed, False].index(False)
        tokens = answer[produced : produced + accepted + 1]
        step = Step(tokens, drafted, accepted, (EarlyExit.name,) * drafted)
        rounds.append(step.first(n - produced))
        produced += len(rounds[-1].tokens)
    return rounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted figures of one exit layer and draft length.

    Attributes:
        tokens_per_s: new tokens after the first / seconds of decoding, over all prompts.
        speedup: over plain decoding predicted from the same costs.
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
    """Return the tokens/s of plain decoding."""
    positions = [c.prompt_tokens + i for c in continuations for i in range(len(c.token_ids) - 1)]
    return len(positions) / _seconds(costs, positions, costs.plain_s)


def predict(
    costs: Costs, continuations: Sequence[Continuation], max_draft_tokens: int
) -> list[Prediction]:
    """Return the predictions of every exit and draft length, the fastest first.

    Args:
        costs: measured up to `max_draft_tokens` + 1 positions.
        continuations: with the agreement of all exits of `costs`.
        max_draft_tokens: draft lengths 1 to this.
    """
    plain = predict_plain(costs, continuations)
    predictions = [
        _predict_one(costs, continuations, e, d, plain)
        for e in costs.exits
        for d in range(1, max_draft_tokens + 1)
    ]
    return sorted(predictions, key=lambda p: p.tokens_per_s, reverse=True)


def _predict_one(
    costs: Costs,
    continuations: Sequence[Continuation],
    exit_layer: int,
    draft_tokens: int,
    plain_tokens_per_s: float,
) -> Prediction:
    positions: dict[int, list[int]] = defaultdict(list)  # draft length -> starts of rounds
    tokens = drafted = accepted = rounds = 0
    for c in continuations:
        produced = 1
        for step in replay(c, exit_layer, draft_tokens):
            # The whole draft is computed even where the answer ends inside it.
            n = c.draft_length(produced, draft_tokens)
            positions[n].append(c.prompt_tokens + produced - 1)
            produced += len(step.tokens)
            tokens += len(step.tokens)
            drafted += step.drafted
            accepted += step.accepted
            rounds += 1
    seconds = sum(
        _seconds(costs, starts, costs.round_s(exit_layer, n)) for n, starts in positions.items()
    )
    return Prediction(
        exit_layer=exit_layer,
        draft_tokens=draft_tokens,
        tokens_per_s=tokens / seconds,
        speedup=tokens / seconds / plain_tokens_per_s,
        acceptance_rate=accepted / drafted if drafted else None,
        mean_accepted_length=tokens / rounds,
    )


def _seconds(costs: Costs, positions: Sequence[int], step_s: NDArray[np.float64]) -> float:
    """Return the sum of steps at some positions, given their seconds [C] at each context length."""
    return float(np.interp(positions, costs.contexts, step_s).sum())
