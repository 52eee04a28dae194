"""What a training run writes down, and when it stops early."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import ExportableState

from layerskip.errors import TrainingWarning
from layerskip.fileio import replace
from layerskip.recipe.attach import AttachedRecipe
from layerskip.training.checkpointing import unwritten


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


class ProgressCallback(TrainerCallback):
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


_PATIENCE = 10  # steps without a label, at the beginning


class RecipeCallback(TrainerCallback):
    """Tells an attached recipe the training step; for a plain Trainer whose model has one.

    Args:
        attached: what `attach` returned.
    """

    def __init__(self, attached: AttachedRecipe) -> None:
        self._attached = attached
        self._unlabelled: int | None = 0  # steps so far; None once there was a label
        self._labels = 0  # of the step's batches before the last

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse what takes the recipe off the model, silently."""
        self._unlabelled = 0
        if getattr(args, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel puts another forward over the recipe's, which then does nothing; "
                "leave it out: the recipe takes Liger's loss itself where it is installed"
            )
        check_arguments(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first batch of an optimizer step."""
        self._attached.set_step(state.global_step, state.max_steps)
        self._attached.last = None
        self._labels = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each batch of an optimizer step but the last."""
        self._labels += self._attached.last.tokens if self._attached.last else 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a step that came about without the exits' loss, and training without labels."""
        if self._attached.last is None:
            raise ValueError(
                "the model was called without labels, so the recipe had no loss: leave out what "
                "computes another, such as compute_loss_func, and give a trainer that computes its own "
                "(TRL's) LayerSkipMixin"
            )
        if self._unlabelled is None:
            return
        labels = self._labels + self._attached.last.tokens
        self._unlabelled = None if labels else self._unlabelled + 1
        if self._unlabelled == min(_PATIENCE, state.max_steps):
            raise ValueError(
                f"no row of the first {self._unlabelled} steps had a label to learn (all are -100): are"
                " prompts longer than the rows are cut, or is there no completion?"
            )


def check_gpus(count: int) -> None:
    """Raise ValueError where a Trainer would drive several GPUs in one process."""
    if count > 1:
        raise ValueError(
            f"{count} GPUs in one process are not supported: start with "
            "`torchrun` or `accelerate launch`, or choose one with CUDA_VISIBLE_DEVICES"
        )


def check_arguments(args: Any) -> None:
    """Raise ValueError where a Trainer's arguments take the labels or the forward from the model."""
    check_gpus(args.n_gpu)
    if not math.isfinite(args.learning_rate):
        raise ValueError(f"learning_rate is {args.learning_rate}; it must be a number")
    metric = getattr(args, "metric_for_best_model", None) or ""
    if "loss_exit_" in metric and args.greater_is_better:
        raise ValueError(
            f"the best {metric} is the lowest, but transformers takes it for the highest: set "
            "greater_is_better=False"
        )
    if args.label_smoothing_factor or getattr(args, "loss_type", None) not in (None, "nll"):
        raise ValueError(
            "the recipe computes its own loss: leave out label_smoothing_factor, and set TRL's"
            ' loss_type, whose default is another one in some versions, to "nll"'
        )
    if getattr(args, "activation_offloading", False):
        raise ValueError(
            "activation_offloading waits for a backward pass that the exits' loss does not make: leave"
            " it out, gradient checkpointing saves memory too"
        )
    deepspeed = getattr(args, "deepspeed_plugin", None)
    if getattr(deepspeed, "zero_stage", 0) == 3:
        raise ValueError(
            "DeepSpeed ZeRO stage 3 leaves no whole weights to the early exit loss: take stage 2"
        )


def check_sharding(trainer: Any) -> None:
    """Raise ValueError where devices divide weights in a way that the exits' loss cannot have."""
    state = trainer.accelerator.state
    fsdp, parallel = getattr(state, "fsdp_plugin", None), trainer.args.parallelism_config
    sizes = [getattr(parallel, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")]
    if max(*sizes, trainer.get_tp_size()) > 1:
        raise ValueError(
            "tensor, context and sequence parallelism divide what the exits' loss needs whole: divide"
            " the data alone (DDP) or the weights too (FSDP2)"
        )
    if getattr(getattr(state, "dynamo_plugin", None), "use_regional_compilation", False):
        raise ValueError(
            "regional compilation runs a copy of the model that has no recipe: leave it out,"
            " torch_compile compiles the layers"
        )
    if trainer.is_fsdp_enabled and getattr(fsdp, "fsdp_version", 2) == 1:
        raise ValueError(
            "FSDP version 1 leaves no whole weights to the early exit loss: set fsdp_version: 2"
        )
    if trainer.args.fp16 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "the early exit loss takes its gradients before they are scaled, which float16 without"
            " autocast cannot hold: use bfloat16 with FSDP2 and DeepSpeed"
        )


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


class OptionalTensorBoard(TensorBoardCallback):
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
