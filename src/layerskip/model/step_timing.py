"""What more positions cost a pass on this machine: timed once, and kept in the cache folder.

A pass over few positions waits for its weights on one machine and for its arithmetic on another: in
bfloat16 five positions take no longer than one on a CPU with AVX-512, 1.4 times as long with AVX2 alone,
and there in PyTorch 3.4 times. How far it pays to draft depends on little else as much; behind a long
context on what positions cost attention, which may take twice the time that reading it would.
"""

import contextlib
import dataclasses
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

from layerskip.fileio import replace
from layerskip.model.decoder import Decoder
from layerskip.model.hardware import machine
from layerskip.model.native import build
from layerskip.model.native import build as threads
from layerskip.paths import cache_folder


def device_clock(device: torch.device) -> Callable[[], float]:
    """A function that returns seconds, read after all work that its thread has queued is done.

    It waits for a stream and not for the whole device: that would wait for other threads' work too, and
    fail while one of them captures a CUDA graph.
    """
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    return now


Costs = tuple[float, ...]
Product = Callable[[int, int], object]
"""What is timed, over so many rows behind so many settled positions."""

FAR = 512  # settled positions that attention is timed behind
_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
_MOST_ROWS = max(_ROWS)
_TIMED = (*((rows, 0) for rows in _ROWS), *((rows, FAR) for rows in (1, 4, _MOST_ROWS)))
_ROUNDS, _MOST_ROUNDS = 4, 24
_MOST_SECONDS = 4.0  # after the first rounds: slow products on a busy machine would take minutes
_STEADY = 1.05  # of a least time that was reached twice: how far the two may differ
# Of weights: more than caches hold, which grow with the threads.
_BYTES, _BYTES_A_THREAD, _MOST_BYTES = 1 << 28, 1 << 24, 1 << 29
_TIMING = threading.Lock()  # two that time at once take each other's processors
_known: dict[tuple[object, ...], "PassCosts"] = {}


@dataclasses.dataclass(frozen=True)
class PassCosts:
    """What passes over 1, 2, ... positions cost, in units of one's.

    Attributes:
        passes: with nothing settled before them.
        attention: what `FAR` settled positions add to each; None = not known.
        seconds: what such a unit is, for all layers and the head.
    """

    passes: Costs
    attention: Costs | None = None
    seconds: float = math.inf


def costs_kind(decoder: Decoder) -> tuple[str, ...]:
    """The `StepCosts.kind` of what is measured with a decoder here."""
    here = decoder.kernels, machine(decoder.device)
    return decoder.dtype_name, decoder.weights, decoder.device.type, *here


def pass_costs(decoder: Decoder) -> PassCosts:
    """Passes over 1, 2, ... 16 positions on a CPU: as kept, else timed and kept.

    Those of the decoder's own first layers, more of them than caches hold: what rows cost depends on the
    shapes. In PyTorch, on one thread with AVX2, five rows of float32 took twice the time of one in
    SmolLM2-135M's layers, and 5.6 times in a matrix of 8192 x 2048. Takes up to some seconds.
    """
    n_threads, software = _runs_in(decoder)
    known_by = decoder.architecture, software, decoder.dtype, decoder.weights, n_threads
    with _TIMING:
        if known_by not in _known:
            what = hashlib.sha256(f"{decoder.architecture!r}\0{software}".encode()).hexdigest()[:16]
            name = f"{what}.{decoder.dtype_name}.{decoder.weights}.{n_threads}.json"
            _known[known_by] = _kept(name) or _timed_and_kept(name, decoder, n_threads)
        return _known[known_by]


def _runs_in(decoder: Decoder) -> tuple[int, str]:
    """Threads, and what a pass depends on beside them and the model."""
    here = machine(torch.device("cpu"))
    # The name of the library is a hash of sources, compiler and instructions.
    software = build.target().stem if decoder.kernels == "compiled" else _pytorch()
    return threads.num_threads_of(decoder.kernels), f"{here}\0{software}"


@functools.cache
def _pytorch() -> str:
    here = torch.__version__, torch.backends.cpu.get_cpu_capability()
    files = sorted(Path(__file__).parent.glob("*.py"))
    sources = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return "\0".join((*here, sources))


def _layers(decoder: Decoder, n_threads: int) -> tuple[Product, float]:
    """The first layers over random hidden states (experts are chosen by them), and the whole in such."""
    n_layers = len(decoder.layers)
    each = (decoder.weight_bytes - decoder.head.weight_bytes) / n_layers
    n_bytes = min(max(_BYTES, n_threads * _BYTES_A_THREAD), _MOST_BYTES)
    few = max(1, min(n_layers, math.ceil(n_bytes / each)))
    shape = 1, _MOST_ROWS, decoder.architecture.hidden_size
    chance = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(shape, generator=chance, dtype=torch.float32, device="cpu")
    hidden, cache = hidden.to(decoder.dtype), decoder.new_cache(FAR + _MOST_ROWS)

    def product(rows: int, settled: int) -> None:
        cache.lengths.fill_(settled)
        decoder.run(hidden[:, :rows], 0, few, cache)

    return product, decoder.weight_bytes / (few * each)


def _folder() -> Path:
    return cache_folder() / "passes"


def _kept(name: str) -> PassCosts | None:
    """What is kept; None where it is not there, or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        kept = json.loads((_folder() / name).read_text())
        passes, attention = (tuple(map(float, kept[key])) for key in ("passes", "attention"))
        seconds = float(kept["seconds"])
        whole = len(passes) == len(attention) == _MOST_ROWS and passes[0] == 1.0
        numbers = (*(cost - 1.0 for cost in passes), *attention, seconds)
        if whole and all(0.0 <= number < math.inf for number in numbers) and seconds > 0.0:
            return PassCosts(passes, attention, seconds)
    return None


def _timed_and_kept(name: str, decoder: Decoder, n_threads: int) -> PassCosts:
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        costs, steady = _timed(*_layers(decoder, n_threads))
    if not steady:  # a busy machine: good enough for now, but not to be kept
        return costs
    with contextlib.suppress(OSError):  # a cache that cannot be written is no reason to stop
        _folder().mkdir(parents=True, exist_ok=True)
        replace(_folder() / name, json.dumps(dataclasses.asdict(costs)).encode())
    return costs


def _timed(product: Product, share: float) -> tuple[PassCosts, bool]:
    """The least time of each number of rows, and whether each was reached twice.

    They are taken in turns, forwards and backwards. No number of rows costs less than one, nor more
    than as many single ones. More rows may be cheaper, since PyTorch chooses other code for them; where
    that may be chance they cost what fewer do. What attention adds to more rows is no less.

    Args:
        product: takes the rows and the settled positions.
        share: how many such products a pass of all layers and the head is.
    """
    seconds = np.full((2, len(_TIMED)), np.inf)  # the least, and the next
    steady, started = False, time.perf_counter()
    for turn in range(_MOST_ROUNDS):
        for i in range(len(_TIMED))[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            product(*_TIMED[i])
            took = time.perf_counter() - began
            seconds[:, i] = sorted([*seconds[:, i], took])[:2]
        steady = bool((seconds[1] <= _STEADY * seconds[0]).all())
        is_late = time.perf_counter() - started > _MOST_SECONDS
        if turn + 1 >= _ROUNDS and (steady or is_late):
            break
    least, far = np.split(seconds[0], [len(_ROWS)])
    least = least if steady else np.maximum.accumulate(least)
    numbers = np.arange(1, _MOST_ROWS + 1)
    every = np.interp(numbers, _ROWS, least)
    behind = [rows for rows, settled in _TIMED if settled]
    more = np.maximum.accumulate(np.maximum(far - every[np.array(behind) - 1], 0.0))
    attention = np.interp(numbers, behind, more) / every[0]
    costs = np.clip(every / every[0], 1.0, numbers)
    passes, attention = (tuple(round(float(c), 4) for c in row) for row in (costs, attention))
    return PassCosts(passes, attention, float(every[0]) * share), steady
