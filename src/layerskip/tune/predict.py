"""Costs and acceptance to tokens/s: the replay of every answer, priced. Pure functions.

What every exit would have drafted, from the model's own greedy answers.

While a draft is right, the draft stage sees exactly the model's own tokens. So where an exit agrees
with the model along a greedy answer is all there is to know about which drafts are accepted, for every
draft length, and one pass over the answer shows it for every exit.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from layerskip.decoding import Step, iter_exit_hidden_states
from layerskip.decoding.drafters import EarlyExitDrafter
from layerskip.decoding.step import Ending
from layerskip.model import Decoder
from layerskip.tune.costs import Costs

_UNKNOWN = -1  # what the model would say after the answer's end; always cut off
_ROWS = 64  # positions whose logits are computed at once: bounds their memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Continuation:
    """A greedy answer and what each exit would have said along it.

    Attributes:
        prompt_tokens: how long the prompt is.
        token_ids: the answer, N tokens, at least 2.
        limit: how long it might have become; drafts never reach beyond it.
        agreement: exit -> N - 1 truth values: entry i says whether this exit names token i + 1 of the
            answer after the prompt and its tokens 0 ... i. (Token 0 comes from the prompt's pass.)
    """

    prompt_tokens: int
    token_ids: list[int]
    limit: int
    agreement: dict[int, list[bool]]

    def draft_length(self, produced: int, draft_tokens: int) -> int:
        """How many tokens are really drafted in a round that begins after so many new tokens."""
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
    ending = Ending.of(decoder, prompt, limit)
    known = [*prompt, *answer[:-1]]
    expected = torch.tensor(answer[1:], device=decoder.device)
    agreement: dict[int, list[bool]] = {exit_layer: [] for exit_layer in sorted(set(exits))}
    ids = torch.tensor([known], device=decoder.device)
    # The capacity is that of the answer's own cache.
    for first, exit_layer, hidden in iter_exit_hidden_states(decoder, ids, exits, ending.capacity):
        if first + hidden.shape[1] <= len(prompt):
            continue
        marks = agreement[exit_layer]
        for rows in hidden[:, max(len(prompt) - first, 0) :].split(_ROWS, dim=1):
            said = decoder.logits(rows).argmax(dim=-1)[0]
            marks += (said == expected[len(marks) : len(marks) + len(said)]).tolist()
    return Continuation(
        prompt_tokens=len(prompt),
        token_ids=answer,
        limit=ending.limit,
        agreement=agreement,
    )


def agreement_rate(continuations: Sequence[Continuation], exit_layer: int) -> float:
    """Share of all positions at which an exit names the model's next token."""
    marks = [mark for c in continuations for mark in c.agreement[exit_layer]]
    return sum(marks) / len(marks)


def replay(continuation: Continuation, exit_layer: int, draft_tokens: int) -> list[Step]:
    """The rounds in which self-speculative decoding would have given this answer after its first token.

    Exact for greedy decoding up to rounding: where a pass over several positions gives the same top
    tokens as passes over one, these are the steps of a real run.
    """
    marks, n = continuation.agreement[exit_layer], len(continuation.token_ids)
    answer = (*continuation.token_ids, _UNKNOWN)
    rounds = []
    produced = 1
    while produced < n:
        drafted = continuation.draft_length(produced, draft_tokens)
        of_draft = marks[produced - 1 : produced - 1 + drafted]
        accepted = [*of_draft, False].index(False)  # those before the first that is wrong
        tokens = answer[produced : produced + accepted + 1]
        source = EarlyExitDrafter.source if drafted else Step.source  # without drafts: a plain step
        step = Step(tokens, drafted, accepted, source, from_exit=drafted)
        rounds.append(step.first(n - produced))
        produced += len(rounds[-1].tokens)
    return rounds


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
