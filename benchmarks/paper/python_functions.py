"""Functions of Python sources, as rows to train on that every Python has."""

import ast
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Function:
    """A function or method, moved to the left margin.

    Attributes:
        lines: of its source.
        head: number of lines of signature and docstring; None without a docstring.
    """

    lines: tuple[str, ...]
    head: int | None

    def cut(self, n_lines: int) -> tuple[str, str]:
        """Split into a prompt of so many lines and a completion, which begins with the line break.

        Tokenizers merge a line break and the indentation after it into one token.
        """
        prompt = "\n".join(self.lines[:n_lines]).rstrip()
        return prompt, "\n".join(self.lines)[len(prompt) :].rstrip()


def functions(source: str) -> Iterator[Function]:
    """Iterate over the functions of a module and its classes, without nested functions."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):  # some sources are broken on purpose
        return
    lines = source.split("\n")  # splitlines would split at more characters
    for node in _nodes(tree):
        text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        if not text.startswith(("def ", "async def ")):  # a string inside is indented less
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
