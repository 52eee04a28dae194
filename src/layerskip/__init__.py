"""Make one language model faster by itself: layer dropout, early exit, self-speculative decoding."""

from layerskip.decoding import Generation, LayerSkipModel
from layerskip.model import CheckpointError, SourceError, UnsupportedModelError, pull

__version__ = "0.1.0.dev0"

__all__ = [
    "CheckpointError",
    "Generation",
    "LayerSkipModel",
    "SourceError",
    "UnsupportedModelError",
    "__version__",
    "pull",
]
