"""Files that appear whole or not at all."""

import contextlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from layerskip.model.files.json_files import CheckpointError, json_text


def replace(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all: beside it first, then renamed.

    A link goes on pointing to its file, and what is no ordinary file, a pipe or a device, is written to.
    Who may read a file that was there may read the new one, and nobody else.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    beside = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    is_new = not path.exists()
    try:
        beside.touch(mode=0o666 if is_new else 0o600, exist_ok=False)
        beside.write_bytes(content)
        if not is_new:  # last, since the old file may be one that is only read
            shutil.copymode(path, beside)
        flush(beside)
        os.replace(beside, path)
    except OSError as error:
        if error.errno is not None:  # a full disk would name no file, and others the one beside
            error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def replace_json(path: Path, value: dict[str, Any]) -> None:
    """The same with a JSON object, in lines for people to read."""
    replace(path, json_text(value).encode())


def check_within(path: Path, within: Path | None = None, *, is_read: bool = False) -> None:
    """Refuse a link out of its folder: whoever made the folder would choose what is read or replaced.

    Args:
        path: of the file.
        within: that folder where it is not the one that the file lies in.
        is_read: whether it is going to be read and not replaced, so that it may be other folders', too.

    Raises:
        CheckpointError: it is one.
    """
    folder, real = (within or path.parent).resolve(), path.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        # The hub's cache has links from snapshots/REVISION to the repository's blobs, and from some of
        # these to blobs that repositories share.
        repository = folder.parent.parent
        allowed.append(repository)
        if is_read and repository.name.startswith("models--"):
            allowed.append(repository.parent / "blobs")
    if not any(real.is_relative_to(inside) for inside in allowed):
        raise CheckpointError(f"{path} is a link to {real}, outside of its folder: it is refused")


def flush(path: Path) -> None:
    """See that a file, or all files of a folder, are on the disk, before they get their final name."""
    for inside in path.rglob("*") if path.is_dir() else [path]:
        if inside.is_file() and os.name != "nt":  # which flushes no file that was opened to be read
            with inside.open("rb") as file:
                os.fsync(file.fileno())


def share_weights(folder: Path) -> None:
    """Let those who read a folder's JSON read its safetensors, which are made for their owner alone."""
    for weights in folder.rglob("*.safetensors"):
        for beside in sorted(weights.parent.glob("*.json"))[:1]:
            with contextlib.suppress(OSError):  # some file systems have no rights to give
                shutil.copymode(beside, weights)
