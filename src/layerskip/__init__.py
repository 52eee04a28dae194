"""Make one language model faster by itself: layer dropout, early exit, self-speculative decoding."""

import importlib

TYPE_CHECKING = False  # without typing, which would take a tenth of the program's start
if TYPE_CHECKING:
    from layerskip.decoding import Generation, LayerSkipModel
    from layerskip.model import CheckpointError, SourceError, UnsupportedModelError, pull

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Generation",
    "LayerSkipModel",
    "SourceError",
    "UnsupportedModelError",
    "__version__",
    "pull",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first asked for: `layerskip --help` needs no PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "decoding" if name in ("Generation", "LayerSkipModel") else "model"
    return getattr(importlib.import_module(f"{__name__}.{room}"), name)
