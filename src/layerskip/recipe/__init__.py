"""The training recipe of LayerSkip: layer dropout and early exit loss for transformers models."""

from layerskip.recipe.attach import attach, detach
from layerskip.recipe.schedule import RecipeConfig

__all__ = ["RecipeConfig", "attach", "detach"]
