"""Exit adapters: a faster model whose weights and answers stay as they are."""

from layerskip.adapt.config import AdaptConfig
from layerskip.adapt.train import AdaptResult, Progress, adapt

__all__ = ["AdaptConfig", "AdaptResult", "Progress", "adapt"]
