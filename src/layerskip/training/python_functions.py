"""Functions of Python sources, from head to body: rows to train on that every Python has."""

import ast
import os
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or method, moved to the left margin.

    Attributes:
        lines: of its source.
        head: how many of them are signature and docstring; None where there is no docstring.
    """

    lines: tuple[str, ...]
    head: int | None

    def cut(self, n_lines: int) -> tuple[str, str]:
        """Prompt and completion: so many lines, and from the line break after them on the rest.

        Tokenizers take a line break and the indentation after it as one token.
        """
        prompt = "\n".join(self.lines[:n_lines]).rstrip()
        return prompt, "\n".join(self.lines)[len(prompt) :].rstrip()


def standard_library() -> Path:
    """The folder of this Python's own sources."""
    return Path(sysconfig.get_path("stdlib"))


def python_files(folder: Path) -> list[Path]:
    """The sources of a library in order, without its tests and what is installed inside it."""
    found: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = set(folders) - _LEFT_OUT  # not entered: what is installed may be large
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(found)


def functions_in(path: Path) -> list[Function]:
    """The functions of a file; none where it is no Python that can be read."""
    try:
        return list(functions(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError):
        return []


def functions(source: str) -> Iterator[Function]:
    """Those of the module and of its classes, not those inside other functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have escapes that are none
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # some sources are broken on purpose
        return
    lines = source.split("\n")  # splitlines sees more line breaks than Python does
    for node in _nodes(tree):
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if not text.startswith(("def ", "async def ")):  # a text inside stands further left
            continue
        head = None
        if ast.get_docstring(node) is not None:
            head = (node.body[0].end_lineno or 0) - node.lineno + 1
        yield Function(lines=tuple(text.split("\n")), head=head)


def _nodes(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif not isinstance(node, ast.expr):
            yield from _nodes(node)
