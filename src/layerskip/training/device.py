"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch

from layerskip.model.machine import has_fast_bfloat16
from layerskip.training.config import TrainConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def uses_gpu(config: TrainConfig) -> bool:
    """Whether the run is to be on a GPU."""
    return config.device != "cpu" and torch.cuda.is_available()


def arithmetic(config: TrainConfig) -> torch.dtype:
    """The type of a run's products: what `precision` names, or `auto` comes to on this machine."""
    if config.precision != "auto":
        return _DTYPES[config.precision]
    device = torch.device("cuda" if uses_gpu(config) else "cpu")
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
