"""The sha256 by which files are known."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_BYTES_AT_A_TIME = 1 << 20


def sha256_of(paths: Iterable[Path]) -> str:
    """The sha256 of files, read one after the other as if they were one; in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BYTES_AT_A_TIME):
                digest.update(block)
    return digest.hexdigest()
