"""What more rows cost the compiled kernels' products on this machine (see `model.timing`)."""

import torch

from layerskip.model.native.build import target
from layerskip.model.native.panels import FLOATS, PanelMatrix
from layerskip.model.native.threads import usable
from layerskip.model.quantize import GROUP, Quantized
from layerskip.model.timing import BYTES, MOST_ROWS, Costs, Product, timed_once

_INPUTS = 2048
_BYTES_A_THREAD, _MOST_BYTES = 1 << 24, 1 << 29  # more than the caches of many threads hold
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}


def row_costs(kind: str) -> Costs:
    """Products over 1, 2, ... 16 rows, in units of one row's; takes a second until they are kept.

    Args:
        kind: "float32", "bfloat16", "int8" or "int4".
    """
    threads = usable()
    name = f"{target().stem}.{kind}.{threads}.json"
    return timed_once(name, lambda: target().parent, lambda: _product(kind, threads))


def _product(kind: str, threads: int) -> Product:
    matrix = _matrix(kind, min(max(BYTES, threads * _BYTES_A_THREAD), _MOST_BYTES))
    inputs = torch.ones(MOST_ROWS, _INPUTS, **FLOATS)
    return lambda n: matrix(inputs[:n])


def _matrix(kind: str, n_bytes: int) -> PanelMatrix:
    bits = _BITS[kind]
    shape = n_bytes * 8 // bits // _INPUTS, _INPUTS
    if bits > 8:
        return PanelMatrix(torch.ones(shape, dtype=getattr(torch, kind), device="cpu"))
    scales = torch.ones(shape[0], _INPUTS // GROUP, dtype=torch.float16, device="cpu")
    codes = torch.ones(shape, dtype=torch.uint8, device="cpu")
    return PanelMatrix(Quantized(bits, codes, scales, None))
