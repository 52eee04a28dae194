"""How often each exit says what the whole model says, over the answers to any number of prompts."""

import dataclasses
import itertools
from typing import Any

from layerskip.lens.lens import Lens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """Counts over the positions of answers; those of several texts add up.

    Attributes:
        exits: X exit layers, ascending; the last is the whole model.
        prompts: how many texts were looked at.
        positions: how many positions, all texts together.
        agreeing: for each exit, positions where its top token is the last layer's.
        settling: for each exit, positions that it settles: from it on, and not before, every exit looked
            at agrees with the last layer.
    """

    exits: tuple[int, ...]
    prompts: int
    positions: int
    agreeing: tuple[int, ...]
    settling: tuple[int, ...]

    @classmethod
    def of(cls, lens: Lens) -> "Agreement":
        """Count over the positions of the answer that the lens looked at."""
        answer = lens.part(lens.answer_positions)
        return cls(
            exits=answer.exits,
            prompts=1,
            positions=len(answer.positions),
            agreeing=tuple(answer.agrees.sum(dim=1).tolist()),
            settling=tuple(answer.settled.count(e) for e in answer.exits),
        )

    def __add__(self, other: "Agreement") -> "Agreement":
        assert self.exits == other.exits
        return Agreement(
            exits=self.exits,
            prompts=self.prompts + other.prompts,
            positions=self.positions + other.positions,
            agreeing=tuple(map(sum, zip(self.agreeing, other.agreeing, strict=True))),
            settling=tuple(map(sum, zip(self.settling, other.settling, strict=True))),
        )

    @property
    def rates(self) -> list[float]:
        """Share of positions where the exit agrees with the last layer, for each exit."""
        return [n / self.positions for n in self.agreeing]

    @property
    def rate_of(self) -> dict[int, float]:
        """The same by exit."""
        return dict(zip(self.exits, self.rates, strict=True))

    @property
    def settled_by(self) -> list[float]:
        """Share of positions that are settled at the exit or before it, for each exit."""
        return [n / self.positions for n in itertools.accumulate(self.settling)]

    @property
    def mean_settled_layer(self) -> float:
        """The mean of the layers at which positions settle."""
        return sum(e * n for e, n in zip(self.exits, self.settling, strict=True)) / self.positions

    def to_dict(self) -> dict[str, Any]:
        """As JSON: totals, and an entry a layer."""
        return {
            "prompts": self.prompts,
            "positions": self.positions,
            "mean_settled_layer": self.mean_settled_layer,
            "layers": [
                {"exit_layer": e, "agreement": rate, "settled_by": settled}
                for e, rate, settled in zip(self.exits, self.rates, self.settled_by, strict=True)
            ],
        }
