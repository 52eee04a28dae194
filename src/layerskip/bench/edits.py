"""Edits of real Python files: prompts made from modules of the standard library, and their scores.

Each row asks for one change of a complete file and for the complete file in return. Most of such an
answer stands in the prompt, which is where n-gram drafts and predicted outputs pay. Nothing is
downloaded; for one version of Python the rows are always the same.
"""

import ast
import dataclasses
import difflib
import io
import random
import re
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from layerskip.bench.quality import Sample

N_EDITS = 30
LINES = range(50, 301)  # of a file
_SEED = 46
_ATTEMPTS = 200  # modules tried for one edit
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.MULTILINE)
_Function = ast.FunctionDef


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of a file.

    Attributes:
        instruction: what is asked for.
        expected: the file after it; where several answers are right (type hints), the file before.
    """

    instruction: str
    expected: str


class EditRows:
    """The rows of task `edits`, in the form of a data set."""

    def rows(self, split: str, data: str | None = None) -> list[Mapping[str, Any]]:
        """Return the rows: kind, module, instruction, file and the expected file."""
        modules = {path.stem: path for path in _modules()}
        rows = list[Mapping[str, Any]]()
        for number in range(N_EDITS):
            kind = list(EDITS)[number % len(EDITS)]
            chooser = random.Random(f"{_SEED} {number}")
            rows.append({"id": f"edits:{number + 1}", **_row(kind, modules, chooser)})
        return rows


def prompt(row: Mapping[str, Any]) -> str:
    """Return the question of a row."""
    task = f"{row['instruction']} Change nothing else. Answer with the complete file."
    return f"{task}\n\n{fenced(row['file'])}"


def fenced(code: str) -> str:
    """Return a file as a block of code, which is the form of an answer."""
    return f"```python\n{code}```"


def metrics(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Return the shares of answers that parse and that are right, and how much of the file they keep.

    `kept` is the share of the file's lines that stand in the answer in their order.
    """
    codes = [code_of(text) for text in texts]
    trees = [_parsed(code) for code in codes]
    rows = [sample.fields for sample in samples]
    return {
        "parses": fmean(tree is not None for tree in trees),
        "correct": fmean(
            tree is not None and _is_right(code, tree, row)
            for code, tree, row in zip(codes, trees, rows, strict=True)
        ),
        "kept": fmean(_kept(row["file"], code) for code, row in zip(codes, rows, strict=True)),
    }


def code_of(text: str) -> str:
    """Return the first block of code in an answer, which may be cut off; without one the whole text."""
    block = _FENCE.search(text)
    return block[1] if block else text


def _kept(file: str, code: str) -> float:
    lines = file.splitlines()
    matcher = difflib.SequenceMatcher(None, lines, code.splitlines(), autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / len(lines)


def _is_right(code: str, tree: ast.AST, row: Mapping[str, Any]) -> bool:
    expected = ast.parse(row["expected"])
    if row["kind"] == "comments" and _comment_tokens(code):
        return False
    if row["kind"] == "type hints":
        hints = _hints(tree)
        tree, expected = _WithoutHints().visit(tree), _WithoutHints().visit(expected)
        return bool(hints) and ast.dump(tree) == ast.dump(expected)
    return ast.dump(tree) == ast.dump(expected)


def _hints(tree: ast.AST) -> int:
    arguments = (node for node in ast.walk(tree) if isinstance(node, ast.arg))
    return sum(argument.annotation is not None for argument in arguments)


class _WithoutHints(ast.NodeTransformer):
    def visit_FunctionDef(self, node: _Function) -> _Function:
        node.returns = None
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node


def _modules() -> list[Path]:
    """Return the modules of the standard library that are plain text of the right length."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(name for name in sys.stdlib_module_names if not name.startswith("_"))
    return [path for name in names if (path := folder / f"{name}.py").is_file() and _fits(path)]


def _fits(path: Path) -> bool:
    content = path.read_bytes()
    return (
        content.isascii()
        and b"\r" not in content
        and b"\f" not in content
        and b"```" not in content
        and content.endswith(b"\n")
        and content.count(b"\n") in LINES
    )


def _row(kind: str, modules: dict[str, Path], chooser: random.Random) -> dict[str, Any]:
    for _ in range(_ATTEMPTS):
        name = chooser.choice(list(modules))
        file = modules[name].read_text()
        edit = next(EDITS[kind](file, chooser), None)
        if edit is not None and _parsed(edit.expected):
            del modules[name]  # each file once
            return {"kind": kind, "module": name, "file": file, **dataclasses.asdict(edit)}
    raise ValueError(f"this Python's standard library has too few modules for edits ({kind})")


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


# --- kinds of edits: from a file and a random choice to an edit, or to none


def _rename(file: str, chooser: random.Random) -> Iterator[Edit]:
    """Rename a local variable of a function."""
    for function in _functions(file, chooser):
        nodes = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
        # Scopes of their own; and names in f-strings, which older Pythons give wrong places.
        others = (
            ast.Global,
            ast.Nonlocal,
            ast.Lambda,
            ast.FunctionDef,
            ast.ClassDef,
            ast.JoinedStr,
        )
        if any(isinstance(n, others) for n in ast.walk(function) if n is not function):
            continue
        arguments = {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
        stored = {n.id for n in nodes if isinstance(n.ctx, ast.Store)} - arguments
        names = sorted(n for n in stored if len(n) > 2 and [node.id for node in nodes].count(n) > 2)
        if names:
            old = chooser.choice(names)
            new = f"{old}_value"
            if new in file:
                continue
            spots = [(n.lineno, n.col_offset, old, new) for n in nodes if n.id == old]
            yield Edit(
                f"Rename the variable `{old}` in the function `{function.name}` to `{new}`.",
                _replaced(file, spots),
            )


def _type_hints(file: str, chooser: random.Random) -> Iterator[Edit]:
    """Annotate the parameters and the return value of a function."""
    if _hints(ast.parse(file)):
        return
    for function in _functions(file, chooser):
        if 1 <= len([a for a in function.args.args if a.arg not in ("self", "cls")]) <= 4:
            yield Edit(
                "Add type hints to the parameters and the return value of the function"
                f" `{function.name}`.",
                file,
            )


def _comments(file: str, chooser: random.Random) -> Iterator[Edit]:
    """Remove all comments."""
    lines = file.splitlines(keepends=True)
    comments = _comment_tokens(file)
    if not 4 <= len(comments) <= len(lines) // 4:
        return
    for comment in comments:
        row, column = comment.start
        lines[row - 1] = lines[row - 1][:column].rstrip()
        lines[row - 1] += "\n" if lines[row - 1] else ""
    yield Edit("Remove all comments, but keep the docstrings.", "".join(lines))


def _comment_tokens(code: str) -> list[tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [token for token in tokens if token.type == tokenize.COMMENT]


def _default(file: str, chooser: random.Random) -> Iterator[Edit]:
    """Change the default value of a parameter."""
    for function in _functions(file, chooser):
        arguments = function.args.args
        for argument, value in zip(arguments[::-1], function.args.defaults[::-1], strict=False):
            if not isinstance(value, ast.Constant) or value.lineno != value.end_lineno:
                continue
            new = _other_value(value.value)
            if new is not None:
                old = ast.get_source_segment(file, value) or ""
                yield Edit(
                    f"Change the default value of the parameter `{argument.arg}` of the function"
                    f" `{function.name}` from `{old}` to `{new}`.",
                    _replaced(file, [(value.lineno, value.col_offset, old, new)]),
                )


def _other_value(value: object) -> str | None:
    if isinstance(value, bool):
        return repr(not value)
    if isinstance(value, int):
        return repr(value + 1)
    return repr(f"{value}2") if isinstance(value, str) else None


def _parameter(file: str, chooser: random.Random) -> Iterator[Edit]:
    """Add a parameter to a function."""
    for function in _functions(file, chooser):
        spec = function.args
        if spec.vararg or spec.kwarg or spec.kwonlyargs or spec.posonlyargs or not spec.args:
            continue
        last = spec.defaults[-1] if spec.defaults else spec.args[-1]
        assert last.end_lineno is not None
        assert last.end_col_offset is not None
        rest = file.splitlines()[last.end_lineno - 1][last.end_col_offset :]
        if not rest.startswith(")"):
            continue
        yield Edit(
            "Add a parameter `verbose=False` at the end of the parameters of the function"
            f" `{function.name}`.",
            _replaced(file, [(last.end_lineno, last.end_col_offset, "", ", verbose=False")]),
        )


EDITS: dict[str, Callable[[str, random.Random], Iterator[Edit]]] = {
    "rename": _rename,
    "type hints": _type_hints,
    "comments": _comments,
    "default": _default,
    "parameter": _parameter,
}


def _functions(file: str, chooser: random.Random) -> list[_Function]:
    """Return the functions of a file whose names are unique there, in random order."""
    functions = [node for node in ast.walk(ast.parse(file)) if isinstance(node, _Function)]
    names = [function.name for function in functions]
    unique = [function for function in functions if names.count(function.name) == 1]
    chooser.shuffle(unique)
    return unique


def _replaced(file: str, spots: Sequence[tuple[int, int, str, str]]) -> str:
    """Replace texts at (line, column, old, new), where lines are counted from 1."""
    lines = file.splitlines(keepends=True)
    for row, column, old, new in sorted(spots, reverse=True):
        line = lines[row - 1]
        assert line[column:].startswith(old)
        lines[row - 1] = line[:column] + new + line[column + len(old) :]
    return "".join(lines)
