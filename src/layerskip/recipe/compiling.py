"""What torch.compile leaves alone: it compiles the model's own layers, not what goes on between them.

Compiled too, the recipe's code would be compiled anew for every layer, draw and step, until
torch.compile gives up and runs all of it, layers included, as it stands.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_disable: Any = torch.compiler.disable  # torch leaves it untyped


def not_compiled(function: _Function) -> _Function:
    """Neither the function nor what it calls is compiled."""
    return _disable(function)


def compiled_below(function: _Function) -> _Function:
    """The function runs as it stands; what it calls may be compiled."""
    return _disable(function, recursive=False)
