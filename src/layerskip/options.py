"""Fields of configuration objects: an option is spelled once, with its default, help text and bounds.

Command line flags, YAML keys, the reference tables of the docs and the rows of a benchmark are derived
from these fields.
"""

import dataclasses
import operator
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """Description of an option, kept in its field's metadata.

    Attributes:
        help: one sentence for `--help` and the docs.
        choices: the values that are allowed, or None.
        at_least: smallest value allowed.
        above: value that has to be exceeded.
        at_most: largest value allowed.
        flags: names on the command line; () = derived from the field's name.
        metavar: placeholder in `--help`.
        on_command_line: whether commands offer it.
    """

    help: str
    choices: Collection[str] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    on_command_line: bool = True


def option(default: Any, help: str, *, repr: bool = True, **description: Any) -> Any:
    """Return a dataclass field with a default, and an `Option` made of the other arguments."""
    metadata = {"option": Option(help=help, **description)}
    return dataclasses.field(default=default, metadata=metadata, repr=repr)


def options_of(config: Any) -> dict[str, tuple[Any, Option]]:
    """Return the fields of a configuration class that are options: name -> (field, description)."""
    return {
        field.name: (field, field.metadata["option"])
        for field in dataclasses.fields(config)
        if "option" in field.metadata
    }


def check_options(config: Any) -> None:
    """Convert numbers of other libraries to Python's and check choices and bounds.

    Args:
        config: an instance of a frozen dataclass, in its `__post_init__`.

    Raises:
        ValueError: a value has the wrong type or is out of range.
    """
    for name, (field, description) in options_of(config).items():
        value = getattr(config, name)
        if value is None and field.type not in (bool, float, int, str):
            continue
        is_list = typing.get_origin(field.type) is tuple
        convert = _converter(typing.get_args(field.type)[0] if is_list else field.type)
        items = list(value) if is_list else [value]
        if convert is not None:
            items = [convert(name, item) for item in items]
        if is_list or convert is not None:
            object.__setattr__(config, name, tuple(items) if is_list else items[0])
        for item in items:
            if description.choices is not None and item not in description.choices:
                choices = ", ".join(description.choices)
                raise ValueError(f"the {_words(name)} {item!r} is unknown; there are: {choices}")
            if not _in_bounds(item, description):
                raise ValueError(f"{name} is {item}, it has to be {_bounds(description)}")


def integer(name: str, value: Any) -> int:
    """Convert an integer of any library; raise ValueError for all else, booleans included."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {value!r}, it has to be an integer")


def number(name: str, value: Any) -> float:
    """Convert a number of any library; raise ValueError for all else, booleans included."""
    try:
        if not isinstance(value, bool | np.bool_ | str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}, it has to be a number")


def boolean(name: str, value: Any) -> bool:
    """Convert a boolean; raise ValueError for all else."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"{name} is {value!r}, it has to be True or False")


_CONVERTERS: dict[Any, Callable[[str, Any], Any]] = {int: integer, float: number, bool: boolean}


def plain_type(annotation: Any) -> Any:
    """Return T of `T` and `T | None`; other unions as they are."""
    if isinstance(annotation, types.UnionType):
        parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        return parts[0] if len(parts) == 1 else annotation
    return annotation


def _converter(annotation: Any) -> Callable[[str, Any], Any] | None:
    return _CONVERTERS.get(plain_type(annotation))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _in_bounds(value: Any, description: Option) -> bool:
    bounds = description
    if isinstance(value, str | tuple) or not isinstance(value, int | float):
        return True
    return (
        (bounds.at_least is None or value >= bounds.at_least)
        and (bounds.above is None or value > bounds.above)
        and (bounds.at_most is None or value <= bounds.at_most)
        and (isinstance(value, int) or value < float("inf"))
    )


def _bounds(bounds: Option) -> str:
    low, above, high = map(_digits, (bounds.at_least, bounds.above, bounds.at_most))
    if bounds.at_least is not None and bounds.at_most is not None:
        return f"from {low} to {high}"
    text = (
        f"{low} or above"
        if bounds.at_least is not None
        else f"above {above}"
        if bounds.above is not None
        else "finite"
    )
    return text if bounds.at_most is None else f"{text} and at most {high}"


def _digits(bound: float | None) -> str:
    """Return a bound with all digits of an integer."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}" if bound is not None else ""
