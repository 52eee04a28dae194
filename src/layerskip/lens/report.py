"""One text seen through the lens, with all that pictures, pages, and JSON tell about it."""

import dataclasses
from collections.abc import Collection
from typing import Any

from layerskip.decoding import Generation, LayerSkipModel
from layerskip.lens.agreement import Agreement
from layerskip.lens.lens import Lens, look
from layerskip.lens.rounds import Round, rounds
from layerskip.lens.symbols import Symbols


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A prompt and its answer, what every layer would have said, and the rounds that it took.

    Attributes:
        model: the model's name.
        lens: what every layer would have said, at all positions looked at.
        agreement: over the positions of the answer.
        symbols: what to write for a token.
        generation: how the answer came about; None where it was given.
        rounds: empty unless the answer is self-speculative.
    """

    model: str
    lens: Lens
    agreement: Agreement
    symbols: Symbols
    generation: Generation | None
    rounds: tuple[Round, ...]

    @property
    def drafters(self) -> str:
        """Who drafted, in words; empty where nobody did."""
        assert self.generation is not None
        drafting = [step for step in self.generation.steps if step.drafted]
        exit_layer = self.generation.exit_layer
        names = {
            f"layers 1 to {exit_layer}": any(step.from_exit for step in drafting),
            "n-grams": any(step.drafted > step.from_exit for step in drafting),
        }
        return " and ".join(name for name, drafted in names.items() if drafted)

    def part(self, positions: range) -> "Report":
        """The report on some positions; see `Lens.part`. Agreement stays that of the whole answer."""
        return dataclasses.replace(self, lens=self.lens.part(positions))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        lens = self.lens
        return {
            "model": self.model,
            "token_ids": list(lens.token_ids),
            "prompt_tokens": lens.prompt_tokens,
            "generation": None if self.generation is None else self.generation.to_dict(),
            "rounds": [one.to_dict() for one in self.rounds],
            "agreement": self.agreement.to_dict(),
            "positions": [
                {
                    "position": position,
                    "token_id": lens.token_ids[position],
                    "symbol": self.symbols[lens.token_ids[position]],
                    "in_answer": position >= lens.prompt_tokens,
                    "settled_layer": settled,
                    "layers": [self._said(row, column) for row in range(len(lens.exits))],
                }
                for column, (position, settled) in enumerate(
                    zip(lens.positions, lens.settled, strict=True)
                )
            ],
        }

    def _said(self, row: int, column: int) -> dict[str, Any]:
        lens = self.lens
        return {
            "exit_layer": lens.exits[row],
            "agrees": bool(lens.agrees[row, column]),
            "answer_probability": float(lens.answer_probabilities[row, column]),
            "top": [
                {"token_id": token, "symbol": self.symbols[token], "probability": p}
                for token, p in lens.best(row, column)
            ],
        }


def report_on(
    model: LayerSkipModel,
    name: str,
    prompt: list[int],
    answer: Generation | list[int],
    *,
    exits: Collection[int] | None = None,
    start: int = 1,
    capacity: int | None = None,
) -> Report:
    """Look at an answer through a model's layers.

    Args:
        model: the model.
        name: what to call it.
        prompt: token ids.
        answer: made by the model, or any token ids, at least one.
        exits: see `look`.
        start: see `look`; not beyond the first token of the answer.
        capacity: see `look`.

    Raises:
        ValueError: the answer is empty; or see `look`.
    """
    generation = answer if isinstance(answer, Generation) else None
    new = answer.token_ids if isinstance(answer, Generation) else answer
    if not new:
        raise ValueError("the answer is empty; the lens needs at least one token of it")
    how: dict[str, Any] = {"exits": exits, "start": start, "capacity": capacity}
    lens = look(model.decoder, [*prompt, *new], prompt_tokens=len(prompt), **how)
    speculative = generation is not None and generation.mode == "self-speculative"
    return Report(
        model=name,
        lens=lens,
        agreement=Agreement.of(lens),
        symbols=Symbols(model.tokenizer),
        generation=generation,
        rounds=tuple(rounds(generation.steps, len(prompt)) if speculative and generation else ()),
    )
