"""Arguments that callers give: checked before anything runs, and shown where they are passed on."""

import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

_F = TypeVar("_F", bound=Callable[..., Any])


def integer(name: str, value: Any) -> int:
    """An integer of any library; ValueError where it is none, as truth values are not."""
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name} is {value!r}, it has to be an integer")


def number(name: str, value: Any) -> float:
    """A number of any library; ValueError where it is none, as truth values are not."""
    try:
        if not isinstance(value, bool | np.bool_ | str | bytes):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}, it has to be a number")


def optional(kind: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    """What `kind` makes of a value; None = it is left open."""
    return None if value is None else kind(name, value)


def takes_options_of(answer: Callable[..., Any]) -> Callable[[_F], _F]:
    """For what passes `**options` on to `answer`: its signature names them, with their defaults."""
    shown = inspect.signature(answer).parameters.values()
    options = [option for option in shown if option.kind is option.KEYWORD_ONLY]

    def decorate(function: _F) -> _F:
        own = inspect.signature(function)
        given = [x for x in own.parameters.values() if x.kind is not x.VAR_KEYWORD]
        vars(function)["__signature__"] = own.replace(parameters=[*given, *options])
        return function

    return decorate
