"""Training with the recipe: a transformers Trainer, a mixin for others, and `train(config)`."""

from layerskip.training.config import TrainConfig
from layerskip.training.run import train
from layerskip.training.trainer import LayerSkipMixin, LayerSkipTrainer, RecipeCallback

__all__ = ["LayerSkipMixin", "LayerSkipTrainer", "RecipeCallback", "TrainConfig", "train"]
