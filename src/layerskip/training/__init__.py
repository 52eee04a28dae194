"""Training with the recipe: a transformers Trainer, a mixin for others, and `train(config)`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip.training.callbacks import Progress, RecipeCallback
    from layerskip.training.config import TrainConfig
    from layerskip.training.run import train
    from layerskip.training.trainer import LayerSkipMixin, LayerSkipTrainer

__all__ = [
    "LayerSkipMixin",
    "LayerSkipTrainer",
    "Progress",
    "RecipeCallback",
    "TrainConfig",
    "train",
]
_FILES = {
    "TrainConfig": "config",
    "Progress": "callbacks",
    "RecipeCallback": "callbacks",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: whoever reads rows needs no Trainer."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = _FILES.get(name, "trainer")
    return getattr(importlib.import_module(f"{__name__}.{file}"), name)
