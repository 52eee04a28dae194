"""The output folder of a run: lock, settings, and checkpoints that appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from layerskip.data.readers import local_files
from layerskip.errors import TrainingWarning, UnwrittenCheckpointError
from layerskip.fileio import (
    CheckpointError,
    check_within,
    flush,
    json_text,
    make_folder,
    read_json,
    sha256_of,
    share_weights,
    write_json,
)
from layerskip.recipe import RecipeConfig
from layerskip.training.config import TrainConfig, default_alpha

SETTINGS, LOG, CHECKSUMS = "train.json", "train_log.jsonl", "checksums.json"
INCOMPLETE = ".incomplete"  # folder of a checkpoint or result that is being written
_LOCK = ".lock"
_MODEL_FILES = ("*.safetensors", "*.bin", "*.gguf", "config.json", "tokenizer*", "adapter*")
# Pickles of weights, which transformers would load in place of missing safetensors.
_PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin")

# Settings that a resumed run must not change: its result would be of neither the one nor the other.
_FIXED = (
    *(field.name for field in fields(RecipeConfig) if field.name not in ("chunk_tokens", "seed")),
    *("precision", "lora_rank", "lora_alpha"),
)
# Settings that decide which rows a step has, and which are held out.
_ROW_SETTINGS = (
    *("model", "tokenizer", "data", "data_config", "split", "prompt", "completion", "text_field"),
    *("completion_only", "max_length", "packing", "eval_rows", "seed", "rows of a step"),
)


@contextmanager
def lock_output_dir(output: Path) -> Iterator[None]:
    """Create a run's output folder and lock it against other runs.

    Raises:
        ValueError: another run holds it, it is not writable, or a link leads out of it.
    """
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{output} cannot be written to: choose another --output")
    is_new = not output.exists()
    make_folder(output)
    for path in output.iterdir():
        if not path.name.startswith("checkpoint-"):  # these are renamed and deleted, links too
            check_within(path)
    if os.environ.get("RANK", "0") != "0":  # the first process of a run locks for all
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
        message = f"{output} cannot be locked ({error}): no other run may write into it"
        warnings.warn(message, TrainingWarning, stacklevel=3)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows does not remove open files
            (output / _LOCK).unlink()
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                output.rmdir()


def find_resume_checkpoint(config: TrainConfig, output: Path) -> str | None:
    """Return the checkpoint to resume from, or None at the beginning of a run.

    Raises:
        ValueError: the folder has files that would be replaced, or a run that cannot be resumed with
            these settings.
    """
    replaced = {(output / name).resolve() for name in (SETTINGS, LOG)}
    for source in filter(None, (config.data, config.eval_data)):
        for file in local_files(source):
            if Path(file).resolve() in replaced:
                raise ValueError(f"training replaces {file}: choose another --output")
    checkpoint = last_checkpoint(output)
    if checkpoint is not None:
        if not config.resume:
            raise ValueError(
                f"{output} has checkpoints of an earlier run ({Path(checkpoint).name}): go on with "
                "--resume, or choose another --output"
            )
        check_checkpoint(Path(checkpoint))
        _check_resumed_settings(config, output)
        return checkpoint
    if any(path for pattern in _MODEL_FILES for path in output.glob(pattern)):
        raise ValueError(
            f"{output} has a checkpoint, which training would replace: choose another --output"
        )
    if config.resume:
        message = f"there is no checkpoint in {output}: beginning anew"
        warnings.warn(message, TrainingWarning, stacklevel=2)
    return None


def _check_resumed_settings(config: TrainConfig, output: Path) -> None:
    """Compare the settings with those of the run: raise ValueError, or warn of other rows."""
    new = json.loads(json_text(config.as_flat_dict()))
    old = new | (read_json(output / SETTINGS) if (output / SETTINGS).exists() else {})
    for settings in (old, new):
        if settings["lora_rank"] and not settings["lora_alpha"]:
            settings["lora_alpha"] = default_alpha(settings["lora_rank"])
        settings["rows of a step"] = settings["batch_size"] * settings["accumulation"]
    if changed := [name for name in _FIXED if old[name] != new[name]]:
        flags = ", ".join(f"--{name.replace('_', '-')} {_as_flag(old[name])}" for name in changed)
        raise ValueError(
            f"this run was begun with {flags}: --resume goes on with the same alone, or choose another"
            " --output"
        )
    if changed := [name for name in _ROW_SETTINGS if old[name] != new[name]]:
        warnings.warn(
            f"other than before the interruption: {', '.join(changed)}; so rows may come again or be"
            " left out, rows to evaluate on may have been trained on, and the weights are those of the"
            " checkpoint",
            TrainingWarning,
            stacklevel=3,
        )


def _as_flag(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "(none)"
    return "(none)" if value is None else str(value)


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """Return a run's checkpoint of the highest step, or None.

    Only whole checkpoints have such a name: an unfinished one is in the folder `INCOMPLETE`.
    """
    checkpoints = _checkpoints(directory)
    return str(checkpoints[-1][1]) if checkpoints else None


def _checkpoints(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Return steps and folders, ascending."""
    return sorted(
        (int(step), path)
        for path in Path(directory).glob("checkpoint-*")
        if (step := path.name.removeprefix("checkpoint-")).isdigit() and path.is_dir()
    )


def finish_checkpoint(unfinished: Path, final: Path) -> None:
    """Write the checksums of a checkpoint, flush it to the disk, and rename it to its final name."""
    share_weights(unfinished)
    files = sorted(path for path in unfinished.rglob("*") if path.is_file())
    names = {path.relative_to(unfinished).as_posix(): path for path in files}
    write_json(unfinished / CHECKSUMS, {name: sha256_of([path]) for name, path in names.items()})
    flush(unfinished)
    with tempfile.TemporaryDirectory(dir=unfinished.parent) as replaced:
        if final.exists():  # the same step again, after a resume from an earlier one
            final.rename(Path(replaced, final.name))
        unfinished.rename(final)


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are not those that were written, or could run code.

    Raises:
        ValueError: naming what is missing, damaged or unsafe.
    """
    try:
        read_json(checkpoint / TRAINER_STATE_NAME)
        for name, sha256 in read_json(checkpoint / CHECKSUMS).items():
            file = checkpoint / name
            check_within(file, checkpoint)
            if not file.is_file():
                raise CheckpointError(f"{file} is missing")
            if sha256_of([file]) != sha256:
                raise CheckpointError(f"{file} is damaged (another sha256 than in {CHECKSUMS})")
        for name in _PICKLED_WEIGHTS:
            if (checkpoint / name).exists():
                raise CheckpointError(f"{checkpoint / name} is refused: a pickle may run code")
        for file in (*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")):
            _check_pickle(file)
    except CheckpointError as error:
        raise ValueError(
            f"{error}; remove {checkpoint}, and --resume goes on from the one before"
        ) from error


def _check_pickle(file: Path) -> None:
    """Read a pickle of optimizer, scheduler or random states, without copying its tensors.

    PyTorch refuses other objects too, but its message advises to load them all the same.
    """
    try:
        with safe_globals():
            torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(
            f"{file} is refused: it has more than tensors, numbers and texts, or is damaged"
        ) from error


def load_renamed(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint whose names differ from the model's.

    transformers saves the experts of a mixture one by one and holds them stacked in memory; Trainer
    resumes without this conversion.
    """
    saved: set[str] = set()
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            saved.update(opened.keys())
    names = model.state_dict().keys()
    if isinstance(model, PreTrainedModel) and saved - names and names - saved:
        dtype = next(model.parameters()).dtype
        loaded = type(model).from_pretrained(
            checkpoint, config=model.config, dtype=dtype, use_safetensors=True
        )
        model.load_state_dict(loaded.state_dict())


def last_good(directory: str | os.PathLike[str], failed_step: int | None = None) -> str:
    """Describe the last good checkpoint, for error messages.

    Args:
        directory: of the run.
        failed_step: step whose loss is not finite, or None. A checkpoint is good if a step after it
            was finite.
    """
    checkpoints = _checkpoints(directory)
    bad = [
        path for step, path in checkpoints if failed_step is not None and step >= failed_step - 1
    ]
    good = [path for _, path in checkpoints if path not in bad]
    text = f"the last good checkpoint is {good[-1]}" if good else ""
    text = text or f"there is no {'good ' if bad else ''}checkpoint yet"
    if bad:
        names = ", ".join(path.name for path in bad)
        text += f" ({names} may have been bad already: remove it before you --resume)"
    return text


def unwritten(
    what: str, directory: str | os.PathLike[str], error: Exception
) -> UnwrittenCheckpointError:
    """Make the error, of one line, for a file that a run could not write."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return UnwrittenCheckpointError(
        f"{what} could not be written to {directory} ({reason}); {last_good(directory)}. Make room "
        "and go on with --resume"
    )
