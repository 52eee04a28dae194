"""Files that appear whole or not at all."""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_OBEYED = re.compile(r"[\x7f-\x9f]")  # control characters that JSON leaves as they are


class CheckpointError(ValueError):
    """Files that are missing, damaged or do not fit together; the message says which and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: nested too deeply
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """Indented JSON: NaN and infinity become null, and control characters \\u escapes.

    JSON has no such numbers, and a terminal would obey such characters.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n"
    return _OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON object into a file, in lines for people to read."""
    path.write_text(json_text(value), encoding="utf-8")


_BYTES_AT_A_TIME = 1 << 20


def sha256_of(paths: Iterable[Path]) -> str:
    """The sha256 of files, read one after the other as if they were one; in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BYTES_AT_A_TIME):
                digest.update(block)
    return digest.hexdigest()


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
