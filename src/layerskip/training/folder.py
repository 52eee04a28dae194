"""The folder of a run: where in it training begins, and that no two runs write into it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from layerskip.model.files import json_text, read_json
from layerskip.training.checkpoints import last_checkpoint
from layerskip.training.config import TrainConfig
from layerskip.training.errors import TrainingWarning

SETTINGS = "train.json"
_LOCK = ".lock"

# What decides which rows are held back to evaluate on, beside the rows themselves.
_HELD_BACK_BY = (
    "data",
    "data_config",
    "split",
    "prompt",
    "completion",
    "text_field",
    "completion_only",
    "max_length",
    "eval_rows",
    "seed",
)
_STEP = ("batch_size", "accumulation")  # the rows of one
_ADAPTER = ("lora_rank", "lora_alpha")


def where_to_begin(config: TrainConfig, output: Path) -> str | None:
    """The checkpoint to go on from; None at the beginning.

    Raises:
        ValueError: the folder cannot be written to, holds what would be replaced, or is of a run that
            these settings cannot go on with.
    """
    inside = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not inside.is_dir() or not os.access(inside, os.W_OK):
        raise ValueError(f"{output} cannot be written to: choose another --output")
    checkpoint = last_checkpoint(output) if output.exists() else None
    if checkpoint is not None:
        if not config.resume:
            raise ValueError(
                f"{output} has checkpoints of an earlier run ({Path(checkpoint).name}): go on with "
                "--resume, or choose another --output"
            )
        _compare(config, output / SETTINGS)
        return checkpoint
    if any(output.glob("*.safetensors")):
        raise ValueError(
            f"{output} has a checkpoint, which training would replace: choose another --output"
        )
    if config.resume:
        what = f"there is no checkpoint in {output}: beginning anew"
        warnings.warn(what, TrainingWarning, stacklevel=2)
    return None


def _compare(config: TrainConfig, file: Path) -> None:
    """What the run was begun with, and what it is to go on with."""
    before = read_json(file) if file.exists() else {}
    now = json.loads(json_text(config.as_flat_dict()))

    def differ(names: tuple[str, ...]) -> bool:
        return any(before.get(name, now[name]) != now[name] for name in names)

    if differ(_ADAPTER):  # what was learnt would be lost, or scaled by another factor
        was = ", ".join(f"{name} {before.get(name)}" for name in _ADAPTER)
        raise ValueError(f"this run was begun with {was}: it goes on with the same alone")
    if differ(_STEP):
        warnings.warn(
            f"{' or '.join(_STEP)} is another than before the interruption: rows are counted in steps,"
            " so some come again or are left out",
            TrainingWarning,
            stacklevel=3,
        )
    if config.eval_rows and differ(_HELD_BACK_BY):
        warnings.warn(
            f"one of {', '.join(_HELD_BACK_BY)} is another than before the interruption: rows to"
            " evaluate on may have been trained on",
            TrainingWarning,
            stacklevel=3,
        )


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold a folder, which is made where there is none, against other runs; for all processes of one.

    Raises:
        ValueError: another run holds it.
    """
    output.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":  # the first process of a run holds it for all
        yield
        return
    file = output / _LOCK
    try:
        with FileLock(file, blocking=False):
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
    except Timeout:
        raise ValueError(
            f"another run is writing into {output}: wait for its end, or choose another --output"
        ) from None
