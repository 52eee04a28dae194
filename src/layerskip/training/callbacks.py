"""What a training run writes down, and when it stops early."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from layerskip.model.files.writing import replace
from layerskip.recipe.attached import AttachedRecipe
from layerskip.training.checkpoints import unwritten
from layerskip.training.errors import TrainingWarning


class JsonLinesLog(TrainerCallback):
    """Appends every log of a Trainer to a file, one JSON object a line.

    Args:
        path: the file; after a resume, lines of steps that are done again are dropped from it.
        attached: the recipe whose skip rates, one a layer, are added to the lines about training.
    """

    def __init__(self, path: Path, attached: AttachedRecipe) -> None:
        self._path = path.resolve()
        self._attached = attached

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the file, or go on with it, and as often as the arguments say."""
        # How often is said now: after a resume Trainer has what its checkpoint says.
        state.compute_steps(args, state.max_steps)
        if not state.is_world_process_zero:
            return
        kept = [log for log in read_log(self._path) if log["step"] <= state.global_step]
        lines = "".join(json.dumps(log) + "\n" for log in kept if state.global_step)
        replace(self._path, lines.encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the last steps logged too, which may be fewer than there are between two logs."""
        if control.should_training_stop:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write a line."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, **logs}
        if "loss" in logs:
            line["skip_rates"] = [round(rate, 6) for rate in self._attached.skip_rates]
        try:
            with open(self._path, "a", encoding="utf-8", opener=_open_no_link) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise unwritten(
                f"the log of step {state.global_step}", self._path.parent, error
            ) from error


def _open_no_link(path: str, flags: int) -> int:
    """Open a file of the run's own, which no link made since its beginning leads away from."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


class Board(TensorBoardCallback):
    """TensorBoard's own files of the figures; where they cannot be written, training goes on."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Open the files."""
        with self._optional():
            super().on_train_begin(*args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write the figures."""
        with self._optional():
            super().on_log(*args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the files."""
        with self._optional():
            super().on_train_end(*args, **kwargs)

    @contextlib.contextmanager
    def _optional(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.tb_writer = None
            self._SummaryWriter: Any = None  # nor is another one made
            what = f"TensorBoard's files can be written no longer ({error.strerror or error})"
            warnings.warn(what, TrainingWarning, stacklevel=3)


class TimeBudget(TrainerCallback, ExportableState):
    """Fits a run into some minutes: the learning rate schedule ends with them, and so does training.

    The schedule follows the larger of the share of steps that is done and the share of time that is
    gone; the warm-up counts steps alone. Time spent is kept in checkpoints, so a resume has what is
    left. All processes go by the first one's clock, since they must agree on both.

    Args:
        minutes: of training, over all resumes.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._earlier_s = 0.0
        self._start = time.monotonic()
        self._share = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        spent_s = self._earlier_s + time.monotonic() - self._start
        return {"args": {}, "attributes": {"spent_s": spent_s}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Start the clock where the checkpoint stopped it, and bend the schedule."""
        self._start = time.monotonic()
        # A run that began without a budget has none in its checkpoints, and Trainer looks for it.
        nothing: dict[str, Any] = {"args": {}, "attributes": {}}
        state.stateful_callbacks.setdefault(type(self).__name__, nothing)
        if state.global_step:
            self._earlier_s = time_spent(state)
        if isinstance(lr_scheduler, LambdaLR):
            warmup = args.get_warmup_steps(state.max_steps)
            lr_scheduler.lr_lambdas = [
                self._bent(factor, warmup, state.max_steps) for factor in lr_scheduler.lr_lambdas
            ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock, before the schedule is asked for the next step's rate."""
        share = self.state()["attributes"]["spent_s"] / self._seconds
        if torch.distributed.is_initialized():
            shared = torch.tensor(share, dtype=torch.float64, device=args.device)
            torch.distributed.broadcast(shared, 0)
            share = shared.item()
        self._share = min(share, 1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop when the time is over."""
        if self._share >= 1:
            control.should_training_stop = control.should_save = True

    def _bent(
        self, factor: Callable[[int], float], warmup: int, total: int
    ) -> Callable[[int], float]:
        def at(step: int) -> float:
            if step < warmup:
                return factor(step)
            return factor(max(step, warmup + int(self._share * (total - warmup))))

        return at


def time_spent(state: Any) -> float:
    """Seconds that a checkpoint's run had, by its `TimeBudget`; 0 where there was none."""
    saved = state.stateful_callbacks.get(TimeBudget.__name__) or {}
    return float(saved.get("attributes", {}).get("spent_s", 0.0))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; [] where there is none. A line cut off by a crash is left out."""
    logs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            logs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return logs
