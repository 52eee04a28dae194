"""The folder of a run: where in it training begins, and that no two runs write into it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from layerskip.model.files.json_files import json_text, read_json
from layerskip.model.files.writing import check_within, replace_json
from layerskip.training.checkpoints import check_whole, last_checkpoint
from layerskip.training.config import TrainConfig, default_alpha
from layerskip.training.errors import TrainingWarning
from layerskip.training.rows import local_files

SETTINGS, LOG, _ROWS = "train.json", "train_log.jsonl", "rows.json"
_LOCK = ".lock"

# What decides which rows a step has, and which are held back to evaluate on.
_ROWS_BY = (
    "data",
    "data_config",
    "split",
    "prompt",
    "completion",
    "text_field",
    "completion_only",
    "max_length",
    "packing",
    "eval_rows",
    "seed",
)
_OF_A_MODEL = ("*.safetensors", "*.bin", "*.gguf", "config.json", "tokenizer*", "adapter*")
_ADAPTER = ("lora_rank", "lora_alpha")


def where_to_begin(config: TrainConfig, output: Path) -> str | None:
    """The checkpoint to go on from; None at the beginning.

    Raises:
        ValueError: the folder holds what would be replaced, or is of a run that these settings cannot
            go on with.
    """
    _check_data(config, output)
    checkpoint = last_checkpoint(output) if output.exists() else None
    if checkpoint is not None:
        if not config.resume:
            raise ValueError(
                f"{output} has checkpoints of an earlier run ({Path(checkpoint).name}): go on with "
                "--resume, or choose another --output"
            )
        check_whole(Path(checkpoint))
        _compare(config, output / SETTINGS)
        return checkpoint
    if any(found for name in _OF_A_MODEL for found in output.glob(name)):
        raise ValueError(
            f"{output} has a checkpoint, which training would replace: choose another --output"
        )
    if config.resume:
        what = f"there is no checkpoint in {output}: beginning anew"
        warnings.warn(what, TrainingWarning, stacklevel=2)
    return None


def _check_data(config: TrainConfig, output: Path) -> None:
    """Refuse rows in a file that the run writes."""
    written = {(output / name).resolve() for name in (SETTINGS, LOG, _ROWS)}
    for source in filter(None, (config.data, config.eval_data)):
        for file in local_files(source):
            if Path(file).resolve() in written:
                raise ValueError(f"training replaces {file}: choose another --output")


def _compare(config: TrainConfig, file: Path) -> None:
    """What the run was begun with, and what it is to go on with."""
    before, now = _settings_of(config, file)
    # With another adapter what was learnt would be lost, or scaled otherwise.
    if _adapter_of(before) != _adapter_of(now):
        was = ", ".join(f"{name} {before[name]}" for name in _ADAPTER)
        raise ValueError(f"this run was begun with {was}: it goes on with the same alone")
    if _rows_of_a_step(before) != _rows_of_a_step(now):
        warnings.warn(
            "a step has another number of rows than before the interruption: rows are counted in steps,"
            " so some come again or are left out",
            TrainingWarning,
            stacklevel=3,
        )
    if others := [name for name in ("model", "tokenizer") if before[name] != now[name]]:
        warnings.warn(
            f"{', '.join(others)}: another than before the interruption, but the weights are those of"
            " the checkpoint",
            TrainingWarning,
            stacklevel=3,
        )
    if others := [name for name in _ROWS_BY if before[name] != now[name]]:
        so = "rows come again or are left out"
        if config.eval_rows:
            so += ", and rows to evaluate on may have been trained on"
        warnings.warn(
            f"{', '.join(others)}: another than before the interruption, so {so}",
            TrainingWarning,
            stacklevel=3,
        )


def keep_settings(
    config: TrainConfig, output: Path, train_rows: Any, eval_rows: Any, *, resumes: bool
) -> None:
    """Write down what a run is, and which rows it has, and say where they are others on resume.

    The names that data have may stay while the rows behind them change: a file grows, a pattern finds
    one more, a data set of the hub moves on, a tokenizer is another one.

    Args:
        config: of the run.
        output: its folder.
        train_rows: `datasets.Dataset` with `input_ids`.
        eval_rows: such rows held back, or None.
        resumes: whether it goes on from a checkpoint.
    """
    rows = {"train": train_rows, "held_back": eval_rows}
    now = {name: None if own is None else _identity(own) for name, own in rows.items()}
    file = output / _ROWS
    before, settings = _settings_of(config, output / SETTINGS)
    is_said = any(before[name] != settings[name] for name in (*_ROWS_BY, "model", "tokenizer"))
    if resumes and not is_said and file.is_file() and read_json(file) != now:
        warnings.warn(
            "the rows are others than before the interruption, or in other tokens: some come again or"
            " are left out, and rows to evaluate on may have been trained on",
            TrainingWarning,
            stacklevel=2,
        )
    replace_json(output / SETTINGS, config.as_flat_dict())
    replace_json(file, now)


def _identity(rows: Any) -> dict[str, Any]:
    """How many rows these are, and a hash of their tokens in order."""
    column = rows.data.column("input_ids")
    tokens, lengths = hashlib.sha256(), hashlib.sha256()
    for chunk in column.chunks:
        tokens.update(chunk.flatten().to_numpy(zero_copy_only=False).astype("int64").tobytes())
        lengths.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
    return {"rows": len(rows), "sha256": [tokens.hexdigest(), lengths.hexdigest()]}


def _settings_of(config: TrainConfig, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings in a file, as far as they are there else these, and these."""
    now = json.loads(json_text(config.as_flat_dict()))
    return now | (read_json(file) if file.exists() else {}), now


def _adapter_of(settings: dict[str, Any]) -> tuple[int | None, float | None]:
    rank, alpha = (settings[name] for name in _ADAPTER)
    return rank, alpha or (rank and default_alpha(rank))


def _rows_of_a_step(settings: dict[str, Any]) -> int:
    return int(settings["batch_size"] * settings["accumulation"])


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold a folder, which is made where there is none, against other runs; for all processes of one.

    A file system without locks holds nothing, and a warning says so.

    Raises:
        ValueError: another run holds it, it cannot be written to, or a link leads out of it.
    """
    inside = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not inside.is_dir() or not os.access(inside, os.W_OK):
        raise ValueError(f"{output} cannot be written to: choose another --output")
    is_new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    for path in output.iterdir():  # what is written may have any of these names
        if not path.name.startswith("checkpoint-"):  # these are renamed and deleted, links too
            check_within(path)
    if os.environ.get("RANK", "0") != "0":  # the first process of a run holds it for all
        yield
        return
    lock = FileLock(output / _LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another run is writing into {output}: wait for its end, or choose another --output"
        ) from None
    except (OSError, NotImplementedError) as error:
        what = f"{output} cannot be locked ({error}): no other run may write into it"
        warnings.warn(what, TrainingWarning, stacklevel=3)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove what is held
            (output / _LOCK).unlink()
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # nothing came of it
                output.rmdir()
