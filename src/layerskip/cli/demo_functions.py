"""Rows to train on that every Python has: functions of its standard library, head -> body."""

import ast
import dataclasses
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PROMPT_CHARACTERS = 480
COMPLETION_CHARACTERS = 12, 320  # at least, at most
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """A function with a docstring.

    Attributes:
        file: that it stands in.
        prompt: signature and docstring, without the line break after it.
        completion: the rest, from that line break on.
    """

    file: Path
    prompt: str
    completion: str


def standard_library() -> Path:
    """The folder of this Python's own sources."""
    return Path(sysconfig.get_path("stdlib"))


def functions(folder: Path) -> list[Function]:
    """All functions in a folder's sources that are short and have a docstring; each head once."""
    found: dict[str, Function] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(set(folders) - _LEFT_OUT)
        for name in sorted(names):
            if name.endswith(".py"):
                for one in _of_file(Path(parent, name)):
                    found.setdefault(one.prompt, one)
    return list(found.values())


def split(rows: list[Function], held_out: int) -> tuple[list[Function], list[Function]]:
    """Rows to train on, and others from files that nothing is trained on, at most one from each.

    Raises:
        ValueError: there are too few files to hold so many out.
    """
    by_file: dict[Path, list[Function]] = {}
    for one in rows:
        by_file.setdefault(one.file, []).append(one)
    files = list(by_file)
    random.Random(0).shuffle(files)
    if len(files) <= held_out:
        raise ValueError(
            f"this Python has library sources with fitting functions in {len(files)} files only, more"
            f" than {held_out} are needed; use a Python that is installed with its sources"
        )
    shown = [by_file[file][0] for file in files[:held_out]]
    return [one for file in files[held_out:] for one in by_file[file]], shown


def _of_file(path: Path) -> Iterator[Function]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):  # some sources are broken on purpose
        return
    lines = source.split("\n")  # and not splitlines, which sees more line breaks than Python does
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (row := _row(node, lines)):
            prompt, completion = row
            yield Function(file=path, prompt=prompt, completion=completion)


def _row(node: ast.FunctionDef, lines: list[str]) -> tuple[str, str] | None:
    """Head and body; None where there is no docstring, nothing after it, or too much."""
    docstring, *rest = node.body
    if ast.get_docstring(node) is None or not rest:
        return None
    assert docstring.end_lineno is not None
    if rest[0].lineno <= docstring.end_lineno:  # on the same line, behind a semicolon
        return None
    indent = node.col_offset
    head = _outdented(lines[node.lineno - 1 : docstring.end_lineno], indent)
    body = "\n" + _outdented(lines[docstring.end_lineno : node.end_lineno], indent)
    least, most = COMPLETION_CHARACTERS
    fits = len(head) <= PROMPT_CHARACTERS and least <= len(body) <= most
    return (head, body) if fits else None


def _outdented(lines: list[str], by: int) -> str:
    cut = [line if line[:by].strip() else line[by:] for line in lines]
    return "\n".join(cut).rstrip()
