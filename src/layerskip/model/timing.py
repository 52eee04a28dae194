"""What more positions cost a pass on this machine: timed once, and kept in the cache folder.

A pass over few rows waits for its weights on one machine and for its arithmetic on another: five rows of
16-bit weights cost 1.1 times one row on a CPU with a matrix unit, and 1.9 times on one with AVX2 alone;
in PyTorch there, 3.4 times. How far it pays to draft depends on little else as much.
"""

import contextlib
import functools
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from layerskip.model.decoder import Decoder
from layerskip.model.files.source import cache_folder
from layerskip.model.files.writing import replace
from layerskip.model.machine import machine

Costs = tuple[float, ...]
Product = Callable[[int], object]
"""What is timed, over so many rows."""

_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
MOST_ROWS = max(_ROWS)
_ROUNDS, _MOST_ROUNDS = 4, 24
_MOST_SECONDS = 4.0  # after the first rounds: slow products on a busy machine would take minutes
_STEADY = 1.05  # of a least time that was reached twice: how far the two may differ
BYTES = 1 << 26  # of weights: more than most caches hold
_TIMING = threading.Lock()  # two that time at once take each other's processors
_known: dict[str, Costs] = {}


def pass_costs(decoder: Decoder) -> Costs:
    """Passes over 1, 2, ... 16 positions where PyTorch runs the layers on a CPU, in units of one's.

    Those of the decoder's own first layers, more of them than caches hold: what rows cost depends on the
    shapes. On one thread with AVX2 five rows of float32 took twice the time of one in SmolLM2-135M's
    layers, and 5.6 times in a matrix of 8192 x 2048. Takes some seconds until they are kept.
    """
    dtype = str(decoder.dtype).removeprefix("torch.")
    kind = f"{dtype}.{decoder.weights}.{torch.get_num_threads()}"
    what = "\0".join((repr(decoder.architecture), _pytorch()))
    name = f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.{kind}.json"
    # PyTorch chooses other code by the number of rows: four of float32 take less time than three.
    return timed_once(
        name, lambda: cache_folder() / "pytorch", lambda: _layers(decoder), may_fall=True
    )


@functools.cache
def _pytorch() -> str:
    """What a pass in PyTorch depends on beside the model: its version, the machine, what calls it."""
    here = torch.__version__, torch.backends.cpu.get_cpu_capability(), machine(torch.device("cpu"))
    files = sorted(Path(__file__).parent.glob("*.py"))
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return "\0".join((*here, sources))


def _layers(decoder: Decoder) -> Product:
    """The first layers over so many positions, of random hidden states: experts are chosen by them."""
    n_layers = len(decoder.layers)
    each = (decoder.weight_bytes - decoder.head.weight_bytes) / n_layers
    few = max(1, min(n_layers, math.ceil(BYTES / each)))
    shape = 1, MOST_ROWS, decoder.architecture.hidden_size
    chance = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(shape, generator=chance, dtype=torch.float32, device="cpu")
    hidden, cache = hidden.to(decoder.dtype), decoder.new_cache(MOST_ROWS)
    return lambda n: decoder.run(hidden[:, :n], 0, few, cache)


def timed_once(
    name: str,
    folder: Callable[[], Path],
    product: Callable[[], Product],
    *,
    may_fall: bool = False,
) -> Costs:
    """A product's costs over 1, 2, ... 16 rows, in units of one row's: as kept, else timed and kept.

    Args:
        name: of the file to keep them in, after everything that they depend on.
        folder: where that is; may raise OSError.
        product: makes what is timed.
        may_fall: whether more rows may be cheaper.
    """
    with _TIMING:
        if name not in _known:
            _known[name] = _kept(name, folder) or _timed_and_kept(name, folder, product, may_fall)
        return _known[name]


def _kept(name: str, folder: Callable[[], Path]) -> Costs | None:
    """What is kept; None where it is not there, or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        costs = tuple(float(cost) for cost in json.loads((folder() / name).read_text()))
        if len(costs) == MOST_ROWS and costs[0] == 1.0 and all(1 <= c < math.inf for c in costs):
            return costs
    return None


def _timed_and_kept(
    name: str, folder: Callable[[], Path], product: Callable[[], Product], may_fall: bool
) -> Costs:
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        costs, steady = _timed(product(), may_fall)
    if not steady:  # a busy machine: good enough for now, but not to be kept
        return costs
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        folder().mkdir(parents=True, exist_ok=True)
        replace(folder() / name, json.dumps(costs).encode())
    return costs


def _timed(product: Product, may_fall: bool) -> tuple[Costs, bool]:
    """The least time of each number of rows, and whether each was reached twice.

    They are taken in turns, forwards and backwards. No number of rows costs less than one, nor more
    than as many single ones. Where more rows cannot be cheaper, or seem so by chance, they cost what
    fewer do.
    """
    seconds = np.full((2, len(_ROWS)), np.inf)  # the least, and the next
    steady, started = False, time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        for i in range(len(_ROWS))[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            product(_ROWS[i])
            took = time.perf_counter() - began
            seconds[:, i] = sorted([*seconds[:, i], took])[:2]
        steady = bool((seconds[1] <= _STEADY * seconds[0]).all())
        is_late = time.perf_counter() - started > _MOST_SECONDS
        if turn + 1 >= _ROUNDS and (steady or is_late):
            break
    least = seconds[0] if may_fall and steady else np.maximum.accumulate(seconds[0])
    numbers = np.arange(1, MOST_ROWS + 1)
    every = np.interp(numbers, _ROWS, least)
    costs = np.clip(every / every[0], 1.0, numbers)
    return tuple(round(float(cost), 4) for cost in costs), steady
