"""Functions of Python's standard library as rows: docstring, then body; a beginning, then the rest."""

from pathlib import Path

from mixture_sources import Rows, Source, as_question, fits, is_held_out

from layerskip.training import python_functions
from layerskip.training.python_functions import functions_in, python_files

FEWEST_LINES = 6  # of a function that is continued


def standard_library(data: str | None = None, folder: Path | None = None) -> tuple[Rows, Rows]:
    """Rows to train on, and rows held back: those of one module in twenty.

    Args:
        data: not used; the library is that of the running Python.
        folder: another folder of modules.
    """
    root = folder or python_functions.standard_library()
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


SOURCE = Source("functions of Python's standard library", "PSF-2.0", standard_library, running=True)
