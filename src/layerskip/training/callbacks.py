"""What a training run writes down, and when it stops early."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback


class JsonLinesLog(TrainerCallback):
    """Appends every log of a Trainer to a file, one JSON object a line.

    Args:
        path: the file; after a resume, lines of steps that are done again are dropped from it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file, or go on with it."""
        if not state.is_world_process_zero:
            return
        kept = [log for log in read_log(self._path) if log["step"] <= state.global_step]
        lines = "".join(json.dumps(log) + "\n" for log in kept if state.global_step)
        self._path.write_text(lines, encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line."""
        if state.is_world_process_zero:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


class StopAfter(TrainerCallback):
    """Stops training after some minutes, with a checkpoint; a resume has as long again.

    Args:
        minutes: from the start of training.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock."""
        if time.monotonic() - self._start >= self._seconds:
            control.should_training_stop = control.should_save = True


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log; [] where there is none. A line cut off by a crash is left out."""
    logs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            logs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return logs
