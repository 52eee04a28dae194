"""What is evaluated: ways of decoding, and what each of them reaches."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from layerskip.decoding import LayerSkipModel, Plan
from layerskip.decoding.policy import choose

EXITS = 4  # evaluated where none are named: a quarter of the layers, a half, ... all
DRAFTING = ("auto", "self-speculative")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure with its standard error (None where there is none) and its good direction."""

    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: such values are null."""
        numbers = {"value": self.value, "stderr": self.stderr}
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {**finite, "higher_is_better": self.higher_is_better}


@dataclasses.dataclass
class Row:
    """One way of decoding: task -> metric -> figure.

    Attributes:
        plan: what is run.
        mode: that was asked for, which may be "auto".
        drafted: draft tokens over all answers that were generated.
        accepted: those that the model agreed with.
    """

    plan: Plan
    mode: str
    results: dict[str, dict[str, Metric]] = dataclasses.field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        drafts = self.plan.mode == "self-speculative"
        return {
            "mode": self.mode,
            "exit_layer": self.plan.exit_layer,
            "draft_tokens": self.plan.draft_tokens,
            "draft_from": self.plan.draft_from if drafts else None,
            "adaptive": self.plan.adaptive,
            "acceptance_rate": self.accepted / self.drafted if self.drafted else None,
            "results": {
                task: {name: metric.to_dict() for name, metric in metrics.items()}
                for task, metrics in self.results.items()
            },
        }


def rows_of(
    model: LayerSkipModel,
    modes: Sequence[str],
    exit_layers: Sequence[int] | None = None,
    draft_tokens: int | None = None,
    draft_from: str | None = None,
) -> list[Row]:
    """Every mode at every exit; plain decoding has none and is one row, as are modes that run the same.

    Args:
        model: says how many layers there are, and what its checkpoint prefers.
        modes: "auto" and those of `MODES`.
        exit_layers: for early exit and self-speculation. None: for early exit a quarter of the
            layers, a half, three quarters and all; else the checkpoint's own exit.
        draft_tokens: for self-speculation.
        draft_from: for self-speculation, one of `DRAFT_SOURCES`.

    Raises:
        ValueError: as `policy.choose` does.
    """
    n_layers = len(model.decoder.layers)
    quarters = sorted({math.ceil(n_layers * i / EXITS) for i in range(1, EXITS + 1)})
    found: list[Row] = []
    for mode in modes:
        exits: Sequence[int | None] = exit_layers or (quarters if mode == "early-exit" else [None])
        drafts = (draft_tokens, draft_from) if mode in DRAFTING else (None, None)
        has_exits = mode != "plain" and drafts[1] != "n-gram"
        for e in exits if has_exits else [None]:
            plan = choose(mode, e, *drafts, settings=model.settings, n_layers=n_layers)
            if all(row.plan != plan for row in found):
                found.append(Row(plan, mode))
    return found
