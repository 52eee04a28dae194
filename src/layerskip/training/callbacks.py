"""Callbacks of a Trainer: the recipe's step, progress, log, speed, time budget and signals."""

from __future__ import annotations

import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from layerskip.errors import TrainingWarning
from layerskip.fileio import replace
from layerskip.recipe.attach import AttachedRecipe
from layerskip.training.checkpointing import unwritten


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        step: optimizer steps done.
        total_steps: optimizer steps of the whole run.
        logs: metrics logged at this step; {} = only the step changed.
    """

    step: int
    total_steps: int
    logs: dict[str, float]


class ProgressCallback(TrainerCallback):
    """Reports a Trainer's progress to a function, on the first process.

    Args:
        watch: called at the start, after each optimizer step and for each log.
    """

    def __init__(self, watch: Callable[[Progress], None]) -> None:
        self._watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report the number of steps."""
        self._report(state, {})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report a step."""
        self._report(state, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Report metrics."""
        self._report(state, dict(logs))

    def _report(self, state: Any, logs: dict[str, float]) -> None:
        if state.is_world_process_zero:
            self._watch(Progress(state.global_step, state.max_steps, logs))


class TokenRate(TrainerCallback):
    """Tokens per second since the last log, without the time of evaluation and saving."""

    def __init__(self) -> None:
        self._tokens, self._since = 0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self._tokens, self._since = 0, time.monotonic()

    def add(self, tokens: int) -> None:
        """Count a batch of this process."""
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent in this context."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - start

    def take(self, reduce: Callable[[Tensor], Tensor], device: torch.device) -> float:
        """Return tokens per second of all processes since the last call, and reset.

        Args:
            reduce: sums a tensor over the processes.
            device: of the process.
        """
        tokens = reduce(torch.tensor(self._tokens, device=device)).item()
        now = time.monotonic()
        elapsed_s = now - self._since
        self._tokens, self._since = 0, now
        return tokens / max(elapsed_s, 1e-9)


_MAX_UNLABELLED_STEPS = 10  # at the beginning


class RecipeCallback(TrainerCallback):
    """Sets the training step of an attached recipe; for a plain Trainer.

    Args:
        attached: result of `attach`.
    """

    def __init__(self, attached: AttachedRecipe) -> None:
        self._attached = attached
        self._unlabelled: int | None = 0  # steps so far; None after the first label
        self._labels = 0  # of the step's batches but the last

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse arguments with which the recipe would have no effect."""
        self._unlabelled = 0
        if getattr(args, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel puts another forward over the recipe's, which then does nothing; "
                "leave it out: the recipe takes Liger's loss itself where it is installed"
            )
        check_arguments(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the step, before its first batch."""
        self._attached.set_step(state.global_step, state.max_steps)
        self._attached.last = None
        self._labels = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count labels, after each batch of an optimizer step but the last."""
        self._labels += self._attached.last.tokens if self._attached.last else 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a step without the exits' loss, and training without labels."""
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
        if self._unlabelled == min(_MAX_UNLABELLED_STEPS, state.max_steps):
            raise ValueError(
                f"no row of the first {self._unlabelled} steps had a label to learn (all are -100): are"
                " prompts longer than the rows are cut, or is there no completion?"
            )


def check_gpus(count: int) -> None:
    """Raise ValueError for several GPUs in one process."""
    if count > 1:
        raise ValueError(
            f"{count} GPUs in one process are not supported: start with "
            "`torchrun` or `accelerate launch`, or choose one with CUDA_VISIBLE_DEVICES"
        )


def check_arguments(args: Any) -> None:
    """Raise ValueError for arguments of a Trainer that do not work with the recipe's loss."""
    check_gpus(args.n_gpu)
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
    """Raise ValueError where weights are sharded in a way that the exits' loss does not support."""
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
    """Appends every log of a Trainer to a file, one JSON object per line.

    Args:
        path: the file; on resume, lines of repeated steps are dropped.
        attached: the recipe, whose skip rates of all layers are added to training logs.
    """

    def __init__(self, path: Path, attached: AttachedRecipe) -> None:
        self._path = path.resolve()
        self._attached = attached

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin or continue the file."""
        # On resume Trainer would log, save and evaluate as often as the checkpoint's arguments say.
        state.compute_steps(args, state.max_steps)
        if not state.is_world_process_zero:
            return
        logs = [log for log in read_log(self._path) if log["step"] <= state.global_step]
        lines = "".join(json.dumps(log) + "\n" for log in logs if state.global_step)
        replace(self._path, lines.encode())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the last steps too, even if fewer than `logging_steps`."""
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
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise unwritten(
                f"the log of step {state.global_step}", self._path.parent, error
            ) from error


class TimeBudget(TrainerCallback, ExportableState):
    """Ends training, and the learning rate schedule with it, after some minutes.

    The schedule follows the larger of two fractions: steps done, and time spent; the warm-up counts
    steps only. Checkpoints keep the time spent, so a resumed run has the rest. All processes use the
    first one's clock.

    Args:
        minutes: of training, over all resumes.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._earlier_s = 0.0
        self._start = time.monotonic()
        self._fraction = 0.0

    def state(self) -> dict[str, Any]:
        """Return the state that checkpoints keep."""
        spent_s = self._earlier_s + time.monotonic() - self._start
        return {"args": {}, "attributes": {"spent_s": spent_s}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any
    ) -> None:
        """Start the clock where the checkpoint stopped it, and replace the schedule."""
        self._start = time.monotonic()
        # Checkpoints of a run without a budget lack this state, which Trainer expects.
        empty: dict[str, Any] = {"args": {}, "attributes": {}}
        state.stateful_callbacks.setdefault(type(self).__name__, empty)
        if state.global_step:
            self._earlier_s = time_spent(state)
        if isinstance(lr_scheduler, LambdaLR):
            warmup = args.get_warmup_steps(state.max_steps)
            lr_scheduler.lr_lambdas = [
                self._rescaled(factor, warmup, state.max_steps)
                for factor in lr_scheduler.lr_lambdas
            ]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the clock, before the schedule computes the next step's rate."""
        fraction = self.state()["attributes"]["spent_s"] / self._seconds
        if torch.distributed.is_initialized():
            shared = torch.tensor(fraction, dtype=torch.float64, device=args.device)
            torch.distributed.broadcast(shared, 0)
            fraction = shared.item()
        self._fraction = min(fraction, 1.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop at the end of the time."""
        if self._fraction >= 1:
            control.should_training_stop = control.should_save = True

    def _rescaled(
        self, factor: Callable[[int], float], warmup: int, total: int
    ) -> Callable[[int], float]:
        def rescaled(step: int) -> float:
            if step < warmup:
                return factor(step)
            return factor(max(step, warmup + int(self._fraction * (total - warmup))))

        return rescaled


def time_spent(state: Any) -> float:
    """Return the seconds spent by a checkpoint's run with a `TimeBudget`, else 0."""
    saved = state.stateful_callbacks.get(TimeBudget.__name__) or {}
    return float(saved.get("attributes", {}).get("spent_s", 0.0))


class StopSignals(TrainerCallback):
    """Writes a checkpoint before Ctrl-C or SIGTERM ends training.

    As a context manager it replaces the handlers of both signals. After the first signal, training
    stops at the end of the optimizer step with a checkpoint, and on exit the signal's usual handler
    is called. A second signal is handled at once. Outside the main thread, which alone can set
    handlers, nothing is replaced.

    Args:
        num_processes: of the run. With several nothing is replaced, since each process would stop
            after a different step.
    """

    def __init__(self, num_processes: int) -> None:
        self._num_processes = num_processes
        self._usual: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._received: int | None = None

    def __enter__(self) -> StopSignals:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and self._num_processes == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                handler = signal.getsignal(number)
                if callable(handler):  # neither ignored nor the system's default
                    self._usual[number] = handler
                    signal.signal(number, self)
        return self

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._received is not None:
            self._usual[number](number, frame)
            return
        self._received = number
        warnings.warn(
            "finishing this step and writing a checkpoint; Ctrl-C again ends the run at once",
            TrainingWarning,
            stacklevel=2,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after a signal."""
        if self._received is not None:
            control.should_training_stop = control.should_save = True

    def __exit__(self, error_type: Any, *_: Any) -> None:
        for number, handler in self._usual.items():
            signal.signal(number, handler)
        if self._received is not None and error_type is None:
            self._usual[self._received](self._received, None)
            raise KeyboardInterrupt  # where that handler did not raise


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; [] without a file. A line cut off by a crash is left out."""
    logs = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            logs.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return logs
