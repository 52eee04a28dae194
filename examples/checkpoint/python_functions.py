"""Functions of Python's standard library as rows: docstring, then body; a beginning, then the rest."""

import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from mixture_sources import Rows, Source, as_question, fits, is_held_out

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
FEWEST_LINES = 6  # of a function that is continued


def standard_library(data: str | None = None, folder: Path | None = None) -> tuple[Rows, Rows]:
    """Rows to train on, and rows held back: those of one module in twenty.

    Args:
        data: not used; the library is that of the running Python.
        folder: another folder of modules.
    """
    root = folder or Path(sysconfig.get_path("stdlib"))
    train: Rows = []
    held_out: Rows = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        within = path.relative_to(root)
        if LEFT_OUT.intersection(within.parts):
            continue
        module = ".".join(within.with_suffix("").parts)
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
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old modules have escapes that are none
            tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # examples of faults, for tools that read them
        return []
    lines = text.split("\n")  # splitlines sees more line breaks than Python does
    rows: Rows = []
    for function in _functions(tree):
        source = textwrap.dedent("\n".join(lines[function.lineno - 1 : function.end_lineno]))
        if not source.startswith(("def ", "async def ")):  # a text inside stands further left
            continue
        written = source.split("\n")
        if ast.get_docstring(function) is not None:
            kind, cut = "docstring", (function.body[0].end_lineno or 0) - function.lineno + 1
        elif len(written) >= FEWEST_LINES:
            kind, cut = "continuation", len(written) // 3
        else:
            continue
        # Tokenizers take a line break and the indentation after it as one token.
        prompt = "\n".join(written[:cut]).rstrip()
        completion = source[len(prompt) :].rstrip()
        if completion:
            rows.append({"prompt": prompt, "completion": completion, "category": kind})
    return rows


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Those of the module and of its classes, not those inside other functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        elif not isinstance(node, ast.expr):
            yield from _functions(node)


SOURCE = Source("functions of Python's standard library", "PSF-2.0", standard_library)
