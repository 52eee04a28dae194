"""What more rows cost a product on this machine: timed once, and kept beside the compiled kernels.

A pass over few rows waits for its weights on one machine and for its arithmetic on another: five rows of
16-bit weights cost 1.1 times one row on a CPU with a matrix unit, and 1.9 times on one with AVX2 alone.
How far it pays to draft depends on little else as much.
"""

import contextlib
import functools
import json
import threading
import time

import numpy as np
import torch

from layerskip.model.files.writing import replace
from layerskip.model.native.build import target
from layerskip.model.native.panels import FLOATS, PanelMatrix
from layerskip.model.native.threads import usable
from layerskip.model.quantize import GROUP, Quantized

_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_ROUNDS, _MOST_ROUNDS = 4, 24
_STEADY = 1.05  # of a least time that was reached twice: how far the two may differ
_INPUTS = 2048
_BYTES, _BYTES_A_THREAD, _MOST_BYTES = 1 << 26, 1 << 24, 1 << 29  # more than caches hold
_TIMING = threading.Lock()  # two that time at once take each other's processors
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def row_costs(kind: str) -> tuple[float, ...]:
    """Products over 1, 2, ... 16 rows, in units of one row's; takes a second until they are kept.

    Args:
        kind: "float32", "bfloat16", "int8" or "int4".
    """
    with _TIMING:
        return _row_costs(kind, usable())


@functools.cache
def _row_costs(kind: str, threads: int) -> tuple[float, ...]:
    file = target().with_suffix(f".{kind}.{threads}.json")
    with contextlib.suppress(OSError, ValueError, TypeError):  # not there, or damaged
        kept = tuple(float(cost) for cost in json.loads(file.read_text()))
        if len(kept) == max(_ROWS) and kept[0] == 1.0:
            return kept
    matrix = _matrix(kind, min(max(_BYTES, threads * _BYTES_A_THREAD), _MOST_BYTES))
    costs, steady = _timed(matrix)
    if not steady:  # a busy machine: good enough for now, but not to be kept
        return costs
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        replace(file, json.dumps(costs).encode())
    return costs


def _matrix(kind: str, n_bytes: int) -> PanelMatrix:
    bits = _BITS[kind]
    shape = n_bytes * 8 // bits // _INPUTS, _INPUTS
    if bits > 8:
        return PanelMatrix(torch.ones(shape, dtype=getattr(torch, kind), device="cpu"))
    scales = torch.ones(shape[0], _INPUTS // GROUP, dtype=torch.float16, device="cpu")
    codes = torch.ones(shape, dtype=torch.uint8, device="cpu")
    return PanelMatrix(Quantized(bits, codes, scales, None))


def _timed(matrix: PanelMatrix) -> tuple[tuple[float, ...], bool]:
    """The least time of each number of rows, and whether each was reached twice.

    They are taken in turns, forwards and backwards; more rows are never cheaper, and n rows never cost
    more than n single ones.
    """
    inputs = torch.ones(max(_ROWS), matrix.shape[1], **FLOATS)
    seconds = np.full((2, len(_ROWS)), np.inf)  # the least, and the next
    steady = False
    for turn in range(_MOST_ROUNDS):
        for i in range(len(_ROWS))[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            matrix(inputs[: _ROWS[i]])
            took = time.perf_counter() - began
            seconds[:, i] = sorted([*seconds[:, i], took])[:2]
        steady = bool((seconds[1] <= _STEADY * seconds[0]).all())
        if steady and turn + 1 >= _ROUNDS:
            break
    every = np.interp(range(1, max(_ROWS) + 1), _ROWS, np.maximum.accumulate(seconds[0]))
    costs = np.minimum(every / every[0], range(1, max(_ROWS) + 1))
    return tuple(round(float(cost), 4) for cost in costs), steady
