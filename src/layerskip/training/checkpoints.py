"""The checkpoints of a run: which one is the last, and how one appears whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from layerskip.model.files import flush
from layerskip.training.errors import UnwrittenCheckpointError

INCOMPLETE = ".incomplete"


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """The checkpoint of a run with the highest step; None where there is none.

    Only whole checkpoints have that name: an unfinished one lies in a folder of its own.
    """
    found = _checkpoints(directory)
    return str(max(found)[1]) if found else None


def _checkpoints(directory: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Steps and folders."""
    return [
        (int(number), path)
        for path in Path(directory).glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdigit() and path.is_dir()
    ]


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
        model.load_state_dict(type(model).from_pretrained(checkpoint, dtype=dtype).state_dict())


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


def last_good(directory: str | os.PathLike[str]) -> str:
    """What a message of failure says of the checkpoints that are kept."""
    last = last_checkpoint(directory)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"


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
    flush(unfinished)
    with tempfile.TemporaryDirectory(dir=unfinished.parent) as replaced:
        if final.exists():  # the same step again, after a resume from an earlier one
            final.rename(Path(replaced, final.name))
        unfinished.rename(final)
