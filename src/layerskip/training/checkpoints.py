"""The checkpoints of a run: which one is the last, and how one appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import TRAINER_STATE_NAME

from layerskip.model.files.json_files import CheckpointError, read_json
from layerskip.model.files.writing import flush, share_weights
from layerskip.training.errors import UnwrittenCheckpointError

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
