"""Reads and writes files: JSON, hashes, atomic replacement, links out of a folder."""

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

_CONTROL_CHARS = re.compile(r"[\x7f-\x9f]")  # those that JSON does not escape
_CHUNK_BYTES = 1 << 20


class CheckpointError(ValueError):
    """Files are missing, damaged or inconsistent; the message says which and what to do."""


def parse_json(text: str) -> Any:
    """Parse JSON; everything that is wrong with it is a ValueError, too deep nesting included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read or holds no JSON object.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def json_text(value: Any, *, ascii_only: bool = False) -> str:
    """Format indented JSON; NaN and Inf become null, control characters become \\u escapes.

    JSON has no such numbers, and a terminal would obey such characters.
    """
    text = json.dumps(_finite(value), indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n"
    return _CONTROL_CHARS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json_text(value), encoding="utf-8")


def sha256_of(paths: Iterable[Path]) -> str:
    """Return the hexadecimal sha256 of the concatenated files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_CHUNK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically: to a temporary file beside it, which is then renamed.

    A link keeps pointing to its file (see `check_within`), a pipe or device is written to directly,
    and the permissions of an existing file are kept.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    is_new = not path.exists()
    try:
        temporary.touch(mode=0o666 if is_new else 0o600, exist_ok=False)
        temporary.write_bytes(content)
        if not is_new:  # last, since the existing file may be read-only
            shutil.copymode(path, temporary)
        flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None:  # a full disk names no file, other errors the temporary one
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, indented."""
    replace(path, json_text(value).encode())


def make_folder(path: Path) -> None:
    """Make a folder for a result, and its parents, unless it exists.

    Raises:
        ValueError: the name is taken by something else, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be made as a folder ({error.strerror}): choose another --output"
        ) from None


def check_within(path: Path, within: Path | None = None, *, is_read: bool = False) -> None:
    """Refuse a link out of its folder: whoever made the folder would choose what is read or replaced.

    To be called before a file of a foreign folder is copied into a result, and before a file with a
    fixed name in a folder is replaced.

    Args:
        path: of the file.
        within: the folder, if it is not the file's parent.
        is_read: the file is only read, so that it may also lie in the hub's shared blobs.

    Raises:
        CheckpointError: the file lies elsewhere.
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


def check_links(folder: Path) -> None:
    """Refuse a folder in which a settings or tokenizer file is a link out of it (see `check_within`).

    Weights may be links: they are large, and are not copied as files.
    """
    for pattern in (
        "*.json",
        "*.jinja",
        "*.txt",
        "*.model",
        "additional_chat_templates",
        "*/*.jinja",
    ):
        for path in folder.glob(pattern):
            check_within(path, folder, is_read=True)


def flush(path: Path) -> None:
    """Flush a file, or all files of a folder, to the disk, before it gets its final name."""
    for inside in path.rglob("*") if path.is_dir() else [path]:
        if inside.is_file() and os.name != "nt":  # Windows cannot flush a file opened for reading
            with inside.open("rb") as file:
                os.fsync(file.fileno())


def share_weights(folder: Path) -> None:
    """Give a folder's safetensors, which are created private, the permissions of its JSON files."""
    for weights in folder.rglob("*.safetensors"):
        for sibling in sorted(weights.parent.glob("*.json"))[:1]:
            with contextlib.suppress(OSError):  # some file systems have no permissions
                shutil.copymode(sibling, weights)
