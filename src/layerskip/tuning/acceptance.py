"""What every exit would have drafted, from the model's own greedy answers.

While a draft is right, the draft stage sees exactly the model's own tokens. So where an exit agrees
with the model along a greedy answer is all there is to know about which drafts are accepted, for every
draft length, and one pass over the answer shows it for every exit.
"""

import dataclasses
from collections.abc import Sequence

import torch

from layerskip.decoding import Step, walk_exits
from layerskip.decoding.drafters import EarlyExitDrafter
from layerskip.decoding.step import Ending
from layerskip.model import Decoder

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
    for first, exit_layer, hidden in walk_exits(decoder, ids, exits, ending.capacity):
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
