"""What an export says about itself."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

Progress = Callable[[int, int], None]  # tensors written, and of how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
    """A finished export.

    `stored_as` counts tensors by how they are stored (F32, BF16, Q4_1, ...); `carried_over` counts
    those whose bytes are the source's own, neither cast nor quantized again. `nll_change` is what the
    4 bits of a calibrated checkpoint cost, 0.02 = 2% more negative log-likelihood.
    """

    path: Path
    format: str
    exit_layer: int | None
    layers: int
    tied_head: bool
    bytes: int
    tensors: int
    stored_as: dict[str, int]
    carried_over: int
    nll_change: float | None = None
