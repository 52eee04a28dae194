"""How fast training is, without what is done between its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


class TokenRate(TrainerCallback):
    """Tokens a second since the last look; evaluations and saving do not count as time."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock: what was loaded before is no training."""
        self._tokens, self._since = 0, time.monotonic()

    def add(self, tokens: int) -> None:
        """Count a batch of this process."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done inside."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> float:
        """Tokens a second of all processes since the last call; starts anew.

        Args:
            reduce: sums a tensor over the processes.
            device: of the process.
        """
        tokens = reduce(torch.tensor(self._tokens, device=device)).item()
        now = time.monotonic()
        elapsed_s = now - self._since
        self._tokens, self._since = 0, now
        return tokens / max(elapsed_s, 1e-9)
