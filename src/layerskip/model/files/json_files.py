"""Objects of JSON in files, and what is said of files that cannot be used."""

import json
import math
import re
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
