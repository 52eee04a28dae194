"""Python sources that every installation has."""

import os
import sysconfig
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def standard_library() -> Path:
    """Return the folder of this Python's sources."""
    return Path(sysconfig.get_path("stdlib"))


def python_files(folder: Path) -> list[Path]:
    """List the sources of a library in order, without tests and installed packages."""
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = set(folders) - _LEFT_OUT  # prunes the walk
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(files)
