"""An answer, and the numbers that describe how it came about."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from layerskip.decoding.policy import Mode
from layerskip.decoding.step import Step

FinishReason = Literal["stop", "length", "interrupted"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer.

    Attributes:
        text: the new text, without special tokens and without the stop string; empty where the
            checkpoint has no tokenizer.
        token_ids: the new tokens, up to and with the end token.
        finish_reason: "stop" at an end token or stop string, "length" at max_new_tokens or at the end
            of the context, "interrupted" where it is not all of the answer.
        rounds: draft-and-verify rounds; 0 unless self-speculative, like drafted and accepted.
        acceptance_rate: accepted / drafted; None where nothing was drafted.
        mean_accepted_length: tokens a round, the model's own included; None without rounds.
        accepted_by_position: for each draft position, the share of drafts there that were accepted.
        ttft_s: seconds to the first token, prompt included.
        decode_s: seconds from the first token to the last.
        tokens_per_s: new tokens after the first / decode_s; None for a single token.
        steps: the passes that made the answer, in order.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    mode: Mode
    exit_layer: int | None
    draft_tokens: int | None
    ttft_s: float
    decode_s: float
    steps: tuple[Step, ...] = dataclasses.field(repr=False)

    @property
    def new_tokens(self) -> int:
        """How many tokens the answer has."""
        return len(self.token_ids)

    @property
    def rounds(self) -> int:
        """Draft-and-verify rounds; the prompt's own pass is none."""
        return len(self.steps[1:]) if self.mode == "self-speculative" else 0

    @property
    def drafted(self) -> int:
        """Tokens drafted in all rounds; those behind an end in an accepted draft are not counted."""
        return sum(step.drafted for step in self.steps)

    @property
    def accepted(self) -> int:
        """Drafted tokens that the model agreed with."""
        return sum(step.accepted for step in self.steps)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens a round: accepted ones and the model's own (none where an accepted one is the last)."""
        return (self.new_tokens - 1) / self.rounds if self.rounds else None

    @property
    def accepted_by_position(self) -> list[float]:
        """Share of drafts that were accepted, by their position in the round."""
        return accepted_by_position(self.steps)

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of decoding, the prompt left out."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The fields of `generate --json`, in its order."""
        names = (
            "text token_ids finish_reason prompt_tokens new_tokens mode exit_layer draft_tokens"
            " rounds drafted accepted acceptance_rate mean_accepted_length accepted_by_position"
            " ttft_s decode_s tokens_per_s"
        )
        return {name: getattr(self, name) for name in names.split()}


def accepted_by_position(steps: Sequence[Step]) -> list[float]:
    """For draft position i: rounds that accepted more than i tokens / rounds that drafted so many."""
    longest = max((step.drafted for step in steps), default=0)
    rates = []
    for i in range(longest):
        reached = [step for step in steps if step.drafted > i]
        rates.append(sum(step.accepted > i for step in reached) / len(reached))
    return rates
