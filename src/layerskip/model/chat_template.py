"""Chat templates, which somebody else wrote: they are rendered within bounds.

Jinja's sandbox, which transformers uses, keeps a template from calling anything unsafe, but not from
making texts of any size: `'a' * 10**9` has filled the memory before its length can be read. So sizes are
computed first.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any
from unittest import mock

from layerskip.fileio import parse_json
from layerskip.model.hardware import max_resident_bytes

# Arguments of `apply_chat_template` itself, which are no variables of a template.
_NO_VARIABLES = frozenset(
    [
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "tokenizer_kwargs", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    ]
)
_MAX_SIZE = 2**24  # characters of a text, far more than any context
_MAX_TOTAL = 2**28  # characters of all texts that one rendering makes
_LIST_ITEM = 64  # characters that an item of a list counts as
_MAX_BITS = 2**12  # of a whole number
_MAX_LINES = 2_000_000  # of a template that run: seconds
_MAX_GROWTH = 2**28  # bytes of memory that a template may add
_left: ContextVar[list[int] | None] = ContextVar("left", default=None)  # of `_MAX_TOTAL`
_LOCK = threading.Lock()


def template_arguments(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `tools` and `chat_template_kwargs` of a row, as `apply_chat_template` takes them.

    Args:
        row: both may be missing, or JSON text, as tables have them.

    Raises:
        ValueError: one of them has the wrong type, or names no variable of a template.
    """
    tools, variables = (_json_value(row, name) for name in ("tools", "chat_template_kwargs"))
    if tools is not None and not (
        isinstance(tools, list)
        and all(isinstance(tool, Mapping) or callable(tool) for tool in tools)
    ):
        raise ValueError("tools is to be a list of descriptions")
    if variables is not None and not isinstance(variables, Mapping):
        raise ValueError("chat_template_kwargs is to have names and values")
    if reserved := _NO_VARIABLES & set(variables or ()):
        raise ValueError(f"chat_template_kwargs names {min(reserved)}, no variable of a template")
    return {**(variables or {}), "tools": tools or None}


def _json_value(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {getattr(error, 'msg', error)}") from None


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
    """Render messages with the tokenizer's chat template.

    Its texts are bounded, and so are its memory and the number of lines that it runs, in loops and
    macros.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: dicts with role and content.
        arguments: of `apply_chat_template`, but `tokenize`.

    Raises:
        ValueError: the template refuses the messages, fails, or does not end.
    """
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    conversation = [dict(message) for message in messages]
    environment = mock.patch.object(
        chat_template_utils, "ImmutableSandboxedEnvironment", _environment()
    )
    try:
        with _LOCK, environment, _bounded():
            text: str = tokenizer.apply_chat_template(conversation, tokenize=False, **arguments)
    except RecursionError:
        raise ValueError("its macros call each other without end") from None
    except (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return text


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Raise ValueError when templates of this thread make or run too much, or fill the memory."""
    n_lines, before_bytes = 0, max_resident_bytes()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal n_lines
        if frame.f_code.co_filename != "<template>":  # Jinja's name for compiled templates
            return None
        n_lines += 1
        if n_lines > _MAX_LINES:
            raise ValueError("its loops do not end")
        if max_resident_bytes() - before_bytes > _MAX_GROWTH:
            raise ValueError("it takes too much memory")
        return trace

    before, token = sys.gettrace(), _left.set([_MAX_TOTAL])
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        _left.reset(token)


# --- sizes of texts, before they are made

# Filters that make texts, by how often they insert their arguments: once, at each place, or never.
_PADDING = frozenset(["center", "ljust", "rjust", "zfill", "truncate"])
_REPEATING = frozenset(["batch", "slice", "to_bytes", "tojson", "translate", "wordwrap"])
_COPYING = frozenset(
    [
        *("capitalize", "e", "escape", "forceescape", "lower", "pprint", "string", "striptags"),
        *("title", "trim", "upper", "urlize", "wordcount", "xmlattr"),
    ]
)
_FILTERS = _PADDING | _REPEATING | _COPYING | {"format", "indent", "join", "replace", "sum"}


def _spend(size: int) -> None:
    """Count a text of so many characters that is about to be made.

    Raises:
        ValueError: it is too long, or all of them are.
    """
    if size > _MAX_SIZE:
        raise ValueError(f"it makes a text of more than {_MAX_SIZE:,} characters")
    budget = _left.get()
    if budget is not None:
        budget[0] -= size
        if budget[0] < 0:
            raise ValueError(f"it makes texts of more than {_MAX_TOTAL:,} characters")


def _size(value: Any, sizes: dict[int, tuple[int, Any]] | None = None) -> int:
    """Return about how many characters a value has as text; lists may share their parts."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // 3
    if type(value).__name__ in ("Namespace", "TemplateNamespace"):
        value = value._Namespace__attrs
    if not isinstance(value, Collection):
        return 16
    sizes = {} if sizes is None else sizes
    if id(value) not in sizes:
        items = [*value, *value.values()] if isinstance(value, Mapping) else value
        size = sum(2 + _size(item, sizes) for item in items)
        sizes[id(value)] = size, value  # which lives on, so that its id stays its own
    return sizes[id(value)][0]


def _width(value: Any) -> int:
    return abs(value) if isinstance(value, int) else _size(value)


def _size_formatted(text: Any, values: Sequence[Any]) -> int:
    """Return at least the size of a format of printf's or of `str.format` with its values."""
    widths = [int(digits[:12]) for digits in re.findall(r"\d+", text)]
    takes_widths = re.search(r"\*|\{[^}]*\{", text)
    inserted = sum(map(_width if takes_widths else _size, values)) + max(widths, default=0)
    return len(text) + (text.count("%") + text.count("{")) * inserted


def _size_changed(name: str, value: Any, others: Sequence[Any]) -> int:
    """Return at least the size of what a filter or method makes of a value and its other arguments."""
    if name in ("format", "format_map"):
        return _size_formatted(value, others)
    size, text = _size(value), value if isinstance(value, str) else ""
    if name == "replace":
        places = max((text.count(other) for other in others if isinstance(other, str)), default=0)
    elif name in ("expandtabs", "indent"):
        places = text.count("\t") + text.count("\n") + 1
    else:
        places = 1 if name in _PADDING else size if name in _REPEATING else 0
    return size + places * sum(map(_width, others))


def _size_joined(separator: Any, items: Collection[Any]) -> int:
    return _size(items) + len(items) * _size(separator)


def _check_operator(operator: str, left: Any, right: Any) -> None:
    """Raise ValueError where a text, list or whole number would be too large."""
    numbers = [value for value in (left, right) if isinstance(value, int)]
    if operator == "%" and isinstance(left, str):
        _spend(_size_formatted(left, right if isinstance(right, tuple) else [right]))
    elif len(numbers) == 2 and operator in ("*", "**"):
        more = right.bit_length() if operator == "*" else left.bit_length() * (abs(right) - 1)
        if left.bit_length() + more > _MAX_BITS:
            raise ValueError(f"it computes a number of more than {_MAX_BITS:,} bits")
    else:
        sizes = [_size_copied(value) for value in (left, right) if isinstance(value, Sequence)]
        if sizes and operator == "*":
            _spend(max(sizes) * max(1, *numbers))
        elif operator == "+":
            _spend(sum(sizes))


def _size_copied(value: Sequence[Any]) -> int:
    return len(value) * (1 if isinstance(value, str | bytes) else _LIST_ITEM)


@functools.cache
def _environment() -> Any:
    """Return a class of Jinja environments that refuse what is too large before they make it."""
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Joins(NodeTransformer):
        """Replaces each `~`, which cannot be intercepted, by a filter."""

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["%", "*", "**", "+"])

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.filters = _Filters(self.filters)
            self.finalize = self._printed
            del self.globals["lipsum"]  # text of any length

        def _parse(self, *args: Any) -> nodes.Template:
            tree: nodes.Template = Joins().visit(super()._parse(*args))
            tree.set_environment(self)
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            value, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
            if isinstance(value, str | bytes | int):
                if name == "join" and args:
                    args = (_collected(args[0]), *args[1:])
                    _spend(_size_joined(value, args[0]))
                else:
                    _spend(_size_changed(name, value, [*args, *kwargs.values()]))
            return super().call(context, function, *args, **kwargs)

        def concat(self, parts: Iterable[str]) -> str:
            texts, size = [], 0
            for text in parts:
                texts.append(text)
                size += len(text)
                if size > _MAX_SIZE:
                    break
            _spend(size)
            return "".join(texts)

        @staticmethod
        def _printed(value: Any) -> Any:
            if not isinstance(value, str):
                _spend(_size(value))
            return value

    return Environment


def _collected(items: Any) -> Any:
    return items if isinstance(items, Collection) else list(items)


class _Filters(dict[str, Any]):
    """Jinja's filters; those that make texts refuse what is too large."""

    def __init__(self, filters: Mapping[str, Any]) -> None:
        super().__init__()
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        before = int(hasattr(function, "jinja_pass_arg"))  # an environment or context

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            value, others = args[before], [*args[before + 1 :], *kwargs.values()]
            if name == "join":
                value = _collected(value)
                _spend(_size_joined(others, value))
            elif name == "sum":
                value = _collected(value)
                if any(isinstance(other, list | tuple) for other in others):
                    _spend(_size(value) ** 2)  # a longer list for each of them
            else:
                _spend(_size_changed(name, value, others))
            return function(*args[:before], value, *args[before + 1 :], **kwargs)

        super().__setitem__(name, bounded if name in _FILTERS else function)
