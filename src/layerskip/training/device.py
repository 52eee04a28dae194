"""Where a run computes, and in which precision."""

from __future__ import annotations

import functools
import time

import torch
from torch.nn import functional

from layerskip.model.machine import has_fast_bfloat16
from layerskip.training.config import TrainConfig

_PRODUCT = (1024, 768, 2048)  # rows, columns in, columns out: a batch's product in a small model
_TIMES = 5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def uses_gpu(config: TrainConfig) -> bool:
    """Whether the run is to be on a GPU."""
    return config.device != "cpu" and torch.cuda.is_available()


def arithmetic(config: TrainConfig) -> torch.dtype:
    """The type of a run's products: what `precision` names, or `auto` comes to on this machine."""
    if config.precision != "auto":
        return _DTYPES[config.precision]
    if uses_gpu(config):
        is_fast = has_fast_bfloat16(torch.device("cuda"))
    else:  # with AVX-512 it depends on the processor
        is_fast = has_fast_bfloat16(torch.device("cpu")) and (
            _product_s(torch.bfloat16) < _product_s(torch.float32)
        )
    return torch.bfloat16 if is_fast else torch.float32


@functools.cache
def _product_s(dtype: torch.dtype) -> float:
    """Seconds of a product of matrices on the CPU, the least of some, once a process."""
    rows, columns, outputs = _PRODUCT
    x, weight = torch.ones(rows, columns, dtype=dtype), torch.ones(outputs, columns, dtype=dtype)
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
