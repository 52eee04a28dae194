"""A step of an answer, and where the answer ends."""

import dataclasses
from collections.abc import Collection, Sequence

from layerskip.model import Decoder


@dataclasses.dataclass(frozen=True)
class Step:
    """What one pass of the loop settled.

    Attributes:
        tokens: the new tokens, at least one; the first `accepted` of them were drafted.
        drafted: how many tokens were drafted in this round, as far as the answer goes.
        accepted: how many leading drafted tokens the model agreed with.
        source: the drafter that was asked, or "model" where none was.
        rejected: the other drafted tokens: the one that the model corrected, and those after it.
        followed: the last so many drafted tokens were n-grams behind an early exit's draft.
        refused: how many more tokens were drafted and left out as unsure.
        beyond: how many more an early exit drafted, for what would have come after the answer's end.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    source: str = "model"
    rejected: tuple[int, ...] = ()
    followed: int = 0
    refused: int = 0
    beyond: int = 0

    def first(self, n: int) -> "Step":
        """The step cut to its first n tokens, where the answer ends inside it.

        Drafts beyond the end count neither as right nor as wrong: there is no answer to be right about.
        A round that the model's own token ends counts whole.
        """
        if n >= len(self.tokens):
            return self
        drafted, accepted = min(self.drafted, n), min(self.accepted, n)
        followed = max(self.followed - (self.drafted - drafted), 0)
        early = self.source != "n-gram"
        beyond = self.beyond + early * (self.drafted - self.followed - (drafted - followed))
        return Step(
            self.tokens[:n],
            drafted,
            accepted,
            self.source,
            followed=followed,
            refused=self.refused,
            beyond=beyond,
        )


@dataclasses.dataclass
class Ending:
    """Where one answer ends, and how far it is.

    Attributes:
        limit: new tokens at most.
        end_tokens: tokens that end it.
        room: new tokens that it may still have.
        reached: whether it has ended.
    """

    limit: int
    end_tokens: Collection[int]
    room: int
    reached: bool = False

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_tokens: Collection[int],
    ) -> "Ending":
        """The ending of a prompt's answer; raises ValueError where max_new_tokens is below 1."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, it has to be 1 or above")
        # The last new token is never run through the model, so it needs no place in the context.
        limit = min(max_new_tokens, decoder.architecture.max_context - len(prompt) + 1)
        return cls(limit=limit, end_tokens=end_tokens, room=limit)

    def cut(self, step: Step) -> Step:
        """As much of the next step as belongs to the answer."""
        ends = (i for i, token in enumerate(step.tokens, 1) if token in self.end_tokens)
        kept = step.first(min(next(ends, self.limit), self.room))
        self.room -= len(kept.tokens)
        self.reached = self.reached or kept.tokens[-1] in self.end_tokens or self.room == 0
        return kept
