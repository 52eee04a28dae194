"""The checkpoints of a run: which one is the last, and how one appears whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from layerskip.model.weights import flush
from layerskip.training.errors import UnwrittenCheckpointError

INCOMPLETE = ".incomplete"


def last_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """The checkpoint of a run with the highest step; None where there is none.

    Only whole checkpoints have that name: an unfinished one lies in a folder of its own.
    """
    found = [
        (int(number), path)
        for path in Path(directory).glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdigit() and path.is_dir()
    ]
    return str(max(found)[1]) if found else None


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
