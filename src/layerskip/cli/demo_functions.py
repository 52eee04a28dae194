"""Rows of `layerskip demo --train`: short functions with a docstring, head -> body."""

import dataclasses
import random
from pathlib import Path

from layerskip.training.python_functions import functions_in, python_files

PROMPT_CHARACTERS = 480
COMPLETION_CHARACTERS = 12, 320  # at least, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A function.

    Attributes:
        file: that it stands in.
        prompt: signature and docstring, without the line break after it.
        completion: the rest, from that line break on.
    """

    file: Path
    prompt: str
    completion: str


def read(folder: Path) -> list[Row]:
    """All functions in a folder's sources that are short and have a docstring; each head once."""
    found: dict[str, Row] = {}
    least, most = COMPLETION_CHARACTERS
    for file in python_files(folder):
        for function in functions_in(file):
            if function.head is None:
                continue
            prompt, completion = function.cut(function.head)
            if len(prompt) <= PROMPT_CHARACTERS and least <= len(completion) <= most:
                found.setdefault(prompt, Row(file=file, prompt=prompt, completion=completion))
    return list(found.values())


def split(rows: list[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and others from files that nothing is trained on, at most one from each.

    Raises:
        ValueError: there are too few files to hold so many out.
    """
    by_file: dict[Path, list[Row]] = {}
    for row in rows:
        by_file.setdefault(row.file, []).append(row)
    files = list(by_file)
    random.Random(0).shuffle(files)
    if len(files) <= held_out:
        raise ValueError(
            f"this Python has library sources with fitting functions in {len(files)} files only, more"
            f" than {held_out} are needed; use a Python that is installed with its sources"
        )
    shown = [by_file[file][0] for file in files[:held_out]]
    return [row for file in files[held_out:] for row in by_file[file]], shown
