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
        from_exit: how many tokens an early exit drafted, wherever the answer ends. What else was
            drafted was n-grams, behind these or in their place.
        refused: how many more it drafted, which were left out as unsure.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    source: str = "model"
    rejected: tuple[int, ...] = ()
    from_exit: int = 0
    refused: int = 0

    def first(self, n: int) -> "Step":
        """The step cut to its first n tokens, where the answer ends inside it.

        Drafts beyond the end count neither as right nor as wrong: there is no answer to be right about.
        A round that the model's own token ends counts whole.
        """
        if n >= len(self.tokens):
            return self
        return dataclasses.replace(
            self,
            tokens=self.tokens[:n],
            drafted=min(self.drafted, n),
            accepted=min(self.accepted, n),
            rejected=(),
        )


@dataclasses.dataclass
class Ending:
    """Where one answer ends, and how far it is.

    Attributes:
        limit: new tokens at most.
        capacity: positions that the layers see at most, of prompt and answer.
        end_tokens: tokens that end it.
        room: new tokens that it may still have.
        reached: whether it has ended.
    """

    limit: int
    capacity: int
    end_tokens: Collection[int]
    room: int
    reached: bool = False

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        prompt: Sequence[int],
        max_new_tokens: int,
        end_tokens: Collection[int] = (),
    ) -> "Ending":
        """The ending of a prompt's answer; raises ValueError where max_new_tokens is below 1."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}, it has to be 1 or above")
        # The last new token is never run through the model, so it needs no place in the context.
        limit = min(max_new_tokens, decoder.architecture.max_context - len(prompt) + 1)
        capacity = len(prompt) + limit - 1
        return cls(limit=limit, capacity=capacity, end_tokens=end_tokens, room=limit)

    def cut(self, step: Step) -> Step:
        """As much of the next step as belongs to the answer."""
        ends = (i for i, token in enumerate(step.tokens, 1) if token in self.end_tokens)
        kept = step.first(min(next(ends, self.limit), self.room))
        self.room -= len(kept.tokens)
        self.reached = self.reached or kept.tokens[-1] in self.end_tokens or self.room == 0
        return kept
