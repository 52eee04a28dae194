"""The rounds of a self-speculative answer: drafted, accepted, corrected."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from layerskip.decoding import Step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Round:
    """One draft and its verification.

    Attributes:
        position: of its first token in the text, prompt included.
        accepted: drafted tokens that the model agreed with.
        rejected: the other drafted tokens; the first of them is the one that was corrected.
        own: the model's own token after the accepted ones, in the place of the first rejected one
            where there is one; None where the answer ends inside the draft.
    """

    position: int
    accepted: tuple[int, ...]
    rejected: tuple[int, ...]
    own: int | None

    @property
    def corrected(self) -> bool:
        """Whether the model's own token replaced a drafted one."""
        return bool(self.rejected)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**dataclasses.asdict(self), "corrected": self.corrected}


def rounds(steps: Iterable[Step], prompt_tokens: int) -> Iterator[Round]:
    """The rounds of an answer; the first step, the prompt's own pass, is none.

    Args:
        steps: of a `Generation` in mode self-speculative.
        prompt_tokens: how many tokens the prompt has.
    """
    position = prompt_tokens
    for i, step in enumerate(steps):
        if i > 0:
            own = step.tokens[step.accepted :]
            yield Round(
                position=position,
                accepted=step.tokens[: step.accepted],
                rejected=step.rejected,
                own=own[0] if own else None,
            )
        position += len(step.tokens)
