"""Files of JSON, and files that appear whole or not at all."""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """Files that are missing, damaged or do not fit together; the message says which and what to do."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def json_text(value: Any) -> str:
    """JSON in lines for people to read."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON object into a file, in lines for people to read."""
    path.write_text(json_text(value), encoding="utf-8")


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


def flush(path: Path) -> None:
    """See that a file, or all files of a folder, are on the disk, before they get their final name."""
    for inside in path.rglob("*") if path.is_dir() else [path]:
        if inside.is_file() and os.name != "nt":  # which flushes no file that was opened to be read
            with inside.open("rb") as file:
                os.fsync(file.fileno())
