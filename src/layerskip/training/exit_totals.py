"""Loss and accuracy of every exit, summed until they are logged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from layerskip.recipe.exit_loss import ExitLosses


class ExitTotals:
    """Sums over batches, on the device: which exits have a loss changes from step to step.

    Args:
        num_layers: L.
        device: where the sums are kept.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        # rows: cross entropy in nats, correct tokens, labelled tokens; columns: exits 0 to L
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        self._sums = torch.zeros(3, num_layers + 1, dtype=dtype, device=device)

    def add(self, losses: ExitLosses) -> None:
        """Add a batch."""
        exits = list(losses.exits)
        self._sums[0, exits] += losses.loss_sums.to(self._sums.device)
        self._sums[1, exits] += losses.correct.to(self._sums.device)
        self._sums[2, exits] += losses.tokens

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[int, tuple[float, float]]:
        """Mean loss (nats a token) and accuracy of each exit since the last call; starts anew.

        Args:
            reduce: sums a tensor over the processes.
        """
        sums = reduce(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        return {
            exit_layer: (loss / tokens, correct / tokens)
            for exit_layer, (loss, correct, tokens) in enumerate(zip(*sums, strict=True))
            if tokens
        }
