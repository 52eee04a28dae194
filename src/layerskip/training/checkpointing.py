"""The checkpoints of a run: which one is the last, and how one appears whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from layerskip.data.readers import local_files
from layerskip.errors import TrainingWarning, UnwrittenCheckpointError
from layerskip.fileio import (
    CheckpointError,
    check_within,
    flush,
    json_text,
    read_json,
    replace_json,
    share_weights,
)
from layerskip.training.config import TrainConfig, default_alpha

_CHECKPOINT_BYTES = 12  # of a trained parameter: itself and two moments of AdamW, in float32
_RESULT_BYTES = 4


def warn_low_disk_space(model: nn.Module, output: Path, keep: int) -> None:
    """Warn where the disk seems to have less room than checkpoints and result will take.

    It is no error: what a file system calls free may be less or more than it takes, with quotas,
    compression or shared blocks, the run may end before it has `keep` checkpoints, and where the disk
    is full the last ones are kept.

    Args:
        model: what is trained, before it is divided among processes.
        output: the folder of the run.
        keep: checkpoints that stay; one more is there while it is written.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    missing = max(keep + 1 - count_checkpoints(output), 1)
    of_checkpoints = missing * _CHECKPOINT_BYTES * sum(n for n, is_trained in sizes if is_trained)
    needed = of_checkpoints + _RESULT_BYTES * sum(n for n, _ in sizes)
    free = shutil.disk_usage(output).free
    if free < needed:
        warnings.warn(
            f"checkpoints and result may take {needed / 1e9:.1f} GB, and {output} has"
            f" {free / 1e9:.1f} GB free: make room, or keep fewer (keep_checkpoints is {keep})",
            TrainingWarning,
            stacklevel=2,
        )


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
def lock_output_dir(output: Path) -> Iterator[None]:
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


INCOMPLETE = ".incomplete"


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """The checkpoint of a run with the highest step; None where there is none.

    Only whole checkpoints have that name: an unfinished one lies in a folder of its own.
    """
    found = _checkpoints(directory)
    return str(max(found)[1]) if found else None


def count_checkpoints(directory: str | os.PathLike[str]) -> int:
    """How many checkpoints a run has."""
    return len(_checkpoints(directory))


def _checkpoints(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Steps and folders."""
    return [
        (int(number), path)
        for path in Path(directory).glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdigit() and path.is_dir()
    ]


def check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint without something that resuming needs: Trainer would start that part anew.

    A folder is written whole, but parts of it may have been removed or cut since.

    Raises:
        ValueError: naming what is missing or damaged.
    """
    names = {path.name for path in checkpoint.iterdir()}
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
        if any(name.startswith("global_step") for name in names):  # DeepSpeed's own form
            return
        for part in ("optimizer", "scheduler", "rng_state"):
            if not any(name.startswith(part) for name in names):
                raise CheckpointError(f"{checkpoint / part}* is missing")
        if not any("model" in name for name in names):  # of FSDP a folder, of LoRA an adapter's
            raise CheckpointError(f"{checkpoint / 'model.safetensors'} is missing")
        for path in checkpoint.glob("*.pt*"):
            if not zipfile.is_zipfile(path):  # whose end is its list of contents
                raise CheckpointError(f"{path} is cut off or damaged")
        for path in checkpoint.glob("*.safetensors"):
            try:
                safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} is cut off or damaged ({error})") from error
    except CheckpointError as error:
        raise ValueError(
            f"{error}; remove {checkpoint}, and --resume goes on from the one before"
        ) from error


def load_renamed(model: nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint once more, as any checkpoint is, where some of its weights have other names.

    transformers writes experts one by one, as they were published, and has them together in memory.
    """
    stored: set[str] = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            stored.update(opened.keys())
    here = model.state_dict().keys()
    if isinstance(model, PreTrainedModel) and stored - here and here - stored:
        dtype = next(model.parameters()).dtype
        again = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=dtype, use_safetensors=True
        )
        model.load_state_dict(again.state_dict())


def remove_old_checkpoints(
    directory: str | os.PathLike[str], keep: int, step: int, best: str | None = None
) -> None:
    """Remove checkpoints until `keep` are left, beginning with the oldest.

    Those of steps after this one are of a run that was left for this one: they count as the oldest.
    Steps tell what is old, since a clock may go back.

    Args:
        directory: of the run.
        keep: how many stay, at least 1.
        step: the last one that was written, which stays.
        best: a checkpoint that stays as well, or None.
    """
    found = sorted(_checkpoints(directory), key=lambda of: (of[0] <= step, of[0]))
    spare = [path for number, path in found if number != step and path != Path(best or "")]
    for path in spare[: max(len(found) - keep, 0)]:
        shutil.rmtree(path, ignore_errors=True)


def last_good(directory: str | os.PathLike[str], failed_step: int | None = None) -> str:
    """What a message of failure says of the checkpoints that are kept.

    Args:
        directory: of the run.
        failed_step: whose figures are not finite, or None. Then a checkpoint is good if a step behind
            it was taken; that of the step before may be what went wrong.
    """
    found = sorted(_checkpoints(directory))
    doubtful = [path for step, path in found if failed_step is not None and step >= failed_step - 1]
    good = [path for _, path in found if path not in doubtful]
    if good:
        said = f"the last good checkpoint is {good[-1]}"
    else:
        said = f"there is no {'good ' if doubtful else ''}checkpoint yet"
    if doubtful:
        names = ", ".join(path.name for path in doubtful)
        said += f" ({names} may have been bad already: remove it before you --resume)"
    return said


def unwritten(
    what: str, directory: str | os.PathLike[str], error: Exception
) -> UnwrittenCheckpointError:
    """The error, in one line, for what a run could not write into its folder."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UnwrittenCheckpointError(
        f"{what} could not be written to {directory} ({reason}); {last_good(directory)}. Make room "
        "and go on with --resume"
    )


def move_when_whole(unfinished: Path, final: Path) -> None:
    """Flush a folder's files to the disk, then give it its name in one step."""
    share_weights(unfinished)
    flush(unfinished)
    with tempfile.TemporaryDirectory(dir=unfinished.parent) as replaced:
        if final.exists():  # the same step again, after a resume from an earlier one
            final.rename(Path(replaced, final.name))
        unfinished.rename(final)
