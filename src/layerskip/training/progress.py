"""What whoever called `train` is told while it runs; the libraries below it show nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
        step: optimizer steps done.
        total_steps: of the whole run.
        logs: figures logged at this moment; {} = only the step changed.
    """

    step: int
    total_steps: int
    logs: dict[str, float]


class Watch(TrainerCallback):
    """Hands a Trainer's progress to a function, on the first process.

    Args:
        watch: called at the start, after each optimizer step and for each log.
    """

    def __init__(self, watch: Callable[[Progress], None]) -> None:
        self._watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The number of steps is known."""
        self._tell(state, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more step is done."""
        self._tell(state, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """There are figures."""
        self._tell(state, dict(logs))

    def _tell(self, state: Any, logs: dict[str, float]) -> None:
        if state.is_world_process_zero:
            self._watch(Progress(state.global_step, state.max_steps, logs))
