"""Times passes over several positions, and drafts of exit adapters, on a CPU; keeps them in the cache.

A pass over few positions is limited by memory bandwidth on one machine and by arithmetic on another: in
bfloat16 five positions take no longer than one on a CPU with AVX-512, 1.4 times as long with AVX2 alone,
and there in PyTorch 3.4 times. The best draft length depends on little else as much; after a long
context it depends on the cost of attention, which may take twice the time of reading the KV cache.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerskip.fileio import replace
from layerskip.model.decoder import Decoder
from layerskip.model.hardware import machine
from layerskip.model.native import build
from layerskip.paths import cache_folder

Costs = tuple[float, ...]
ForwardPass = Callable[[int, int], object]
"""Runs a forward pass over so many positions, after so many in the KV cache."""

FAR = 512  # positions in the KV cache for the timing of attention
_ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
_MAX_ROWS = max(_ROWS)
_TIMED = (*((rows, 0) for rows in _ROWS), *((rows, FAR) for rows in (1, 4, 16, _MAX_ROWS)))
_MIN_ROUNDS, _MAX_ROUNDS = 4, 24
TIMED_DRAFTS = _MAX_ROUNDS  # at most
_MAX_SECONDS = 4.0  # after the first rounds: slow layers on a busy machine would take minutes
_STEADY = 1.05  # largest ratio of the two lowest times of a steady measurement
# Bytes of weights: more than caches hold, which grow with the threads.
_MIN_BYTES, _BYTES_PER_THREAD, _MAX_BYTES = 1 << 28, 1 << 24, 1 << 29
_LOCK = threading.Lock()  # two timings at once would slow each other down
# By the names of their files.
_measured: dict[str, "PassCosts"] = {}
_drafts: dict[str, float] = {}


def device_clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds that waits for the work that its thread has queued on the device.

    It synchronizes a stream and not the whole device: that would wait for other threads' work too, and
    fail while one of them captures a CUDA graph.
    """
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.current_stream(device).synchronize()
        return time.perf_counter()

    return now


@dataclasses.dataclass(frozen=True)
class PassCosts:
    """Costs of passes over 1, 2, ... positions, in units of a pass over one.

    Attributes:
        passes: with an empty KV cache.
        attention: the additional cost of `FAR` positions in the KV cache; None = unknown.
    """

    passes: Costs
    attention: Costs | None = None

    def __post_init__(self) -> None:
        costs = (*(cost - 1.0 for cost in self.passes), *(self.attention or ()))
        if not all(0.0 <= cost < math.inf for cost in costs):
            raise ValueError("costs are finite, passes from 1 and attention from 0 on")


def costs_kind(decoder: Decoder) -> tuple[str, ...]:
    """Return the `StepCosts.kind` of measurements with this decoder on this machine."""
    here = decoder.kernels, machine(decoder.device)
    return decoder.dtype_name, decoder.weights, decoder.device.type, *here


def pass_costs(decoder: Decoder) -> PassCosts:
    """Return the costs of passes over 1, 2, ... 32 positions on a CPU, timing them if necessary.

    Timed are the decoder's own first layers, more of them than caches hold, because the costs depend on
    their shapes: in PyTorch, on one thread with AVX2, five rows of float32 took twice the time of one in
    SmolLM2-135M's layers, and 5.6 times in a matrix of 8192 x 2048. That takes up to some seconds.
    """
    n_threads = build.num_threads_of(decoder.kernels)
    name = _file_name(decoder, n_threads)
    with _LOCK:
        if name not in _measured:
            _measured[name] = _read(name) or _time_and_store(name, decoder, n_threads)
        return _measured[name]


def draft_cost(
    decoder: Decoder, n_bytes: int, drafting: Callable[[], Callable[[], object]], way: str = ""
) -> float:
    """Return the cost of a draft in plain steps on a CPU, timing both if necessary.

    Steps and drafts alternate: a step pushes the draft's weights out of the nearest cache, as in
    decoding. That takes about as long as 10 to 50 steps.

    Args:
        decoder: the model.
        n_bytes: of weights that a draft reads, by which it is known.
        drafting: returns a function that drafts a token, `TIMED_DRAFTS` times at most.
        way: names the way of drafting, where the same weights are used in several.
    """
    name = _file_name(decoder, build.num_threads_of(decoder.kernels), f"draft {n_bytes} {way}")
    with _LOCK:
        if name not in _drafts:
            cost = _read_draft(name)
            if cost is None:
                with torch.inference_mode(), torch.autocast("cpu", enabled=False):
                    cost, is_steady = _time_draft(_plain_step(decoder), drafting())
                if is_steady:
                    _store(name, cost)
            _drafts[name] = cost
        return _drafts[name]


def _file_name(decoder: Decoder, n_threads: int, work: str = "passes") -> str:
    """Return the name of the file of a timing: it has all that the times depend on."""
    # The name of the compiled library is a hash of sources, compiler and instructions.
    software = build.target().stem if decoder.kernels == "compiled" else _pytorch()
    # The bytes differ between GGUF files of one model in several formats.
    sizes = f"{decoder.architecture!r}\0{decoder.weight_bytes}\0{decoder.cache_dtype}"
    kind = f"{work}\0{sizes}\0{machine(torch.device('cpu'))}\0{software}"
    digest = hashlib.sha256(kind.encode()).hexdigest()
    return f"{digest[:16]}.{decoder.dtype_name}.{decoder.weights}.{n_threads}.json"


@functools.cache
def _pytorch() -> str:
    sources = b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    capability = torch.backends.cpu.get_cpu_capability()
    return "\0".join((torch.__version__, capability, hashlib.sha256(sources).hexdigest()))


def _read(name: str) -> PassCosts | None:
    """Return stored costs; None if there are none, or they are damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        fields = json.loads((cache_folder() / "passes" / name).read_text())
        passes, attention = (tuple(map(float, fields[key])) for key in ("passes", "attention"))
        if len(passes) == len(attention) == _MAX_ROWS and passes[0] == 1.0:
            return PassCosts(passes, attention)
    return None


def _time_and_store(name: str, decoder: Decoder, n_threads: int) -> PassCosts:
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        costs, is_steady = _time(_first_layers(decoder, n_threads))
    if is_steady:  # times on a busy machine serve this process, and are not stored
        _store(name, dataclasses.asdict(costs))
    return costs


def _store(name: str, costs: object) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written does not matter
        file = cache_folder() / "passes" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, json.dumps(costs).encode())


def _read_draft(name: str) -> float | None:
    """Return a stored cost of a draft; None if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        cost = float(json.loads((cache_folder() / "passes" / name).read_text()))
        if 0.0 < cost < math.inf:
            return cost
    return None


def _plain_step(decoder: Decoder) -> Callable[[], object]:
    cache = decoder.new_cache(1)
    token = torch.zeros(1, 1, dtype=torch.int64, device="cpu")
    return lambda: decoder.greedy_step(token, len(decoder.layers), cache)


def _time_draft(step: Callable[[], object], draft: Callable[[], object]) -> tuple[float, bool]:
    """Return the lowest time of a draft over that of a step, and True if each was reached twice."""
    (of_step, of_draft), is_steady = _lowest_times([step, draft])
    return float(of_draft / of_step), is_steady


def _first_layers(decoder: Decoder, n_threads: int) -> ForwardPass:
    """Return a pass through the first layers.

    Hidden states are random, because they choose the experts of a mixture.
    """
    n_layers = len(decoder.layers)
    layer_bytes = (decoder.weight_bytes - decoder.head.weight_bytes) / n_layers
    n_bytes = min(max(_MIN_BYTES, n_threads * _BYTES_PER_THREAD), _MAX_BYTES)
    n_timed = max(1, min(n_layers, math.ceil(n_bytes / layer_bytes)))
    shape = 1, _MAX_ROWS, decoder.architecture.hidden_size
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    hidden, cache = hidden.to(decoder.dtype), decoder.new_cache(FAR + _MAX_ROWS)

    def forward_pass(rows: int, context: int) -> None:
        cache.lengths.fill_(context)
        decoder.run(hidden[:, :rows], 0, n_timed, cache)

    return forward_pass


def _time(forward_pass: ForwardPass) -> tuple[PassCosts, bool]:
    """Return the lowest time of each number of rows, and True if each was reached twice.

    The numbers are interleaved, forwards and backwards. No number of rows costs less than one row, nor
    more than as many single rows. More rows may be cheaper, since PyTorch has other code for them; where
    that may be noise they cost as much as fewer rows. The cost of attention does not fall with more
    rows.
    """
    works = [functools.partial(forward_pass, *timed) for timed in _TIMED]
    seconds, is_steady = _lowest_times(works, turns_back=True)
    near, far = np.split(seconds, [len(_ROWS)])
    near = near if is_steady else np.maximum.accumulate(near)
    numbers = np.arange(1, _MAX_ROWS + 1)
    by_rows = np.interp(numbers, _ROWS, near)
    far_rows = [rows for rows, context in _TIMED if context]
    extra = np.maximum.accumulate(np.maximum(far - by_rows[np.array(far_rows) - 1], 0.0))
    attention = np.interp(numbers, far_rows, extra) / by_rows[0]
    costs = np.clip(by_rows / by_rows[0], 1.0, numbers)
    passes, attention = (tuple(round(float(c), 4) for c in row) for row in (costs, attention))
    return PassCosts(passes, attention), is_steady


def _lowest_times(
    works: Sequence[Callable[[], object]], *, turns_back: bool = False
) -> tuple[np.ndarray[Any, Any], bool]:
    """Return the lowest times of interleaved works, and True if each was reached twice.

    Args:
        works: in the order of a round.
        turns_back: run every second round in the reverse order.
    """
    seconds = np.full((2, len(works)), np.inf)  # the lowest, and the second lowest
    is_steady, start = False, time.perf_counter()
    for i_round in range(_MAX_ROUNDS):
        for i in range(len(works))[:: -1 if turns_back and i_round % 2 else 1]:
            began = time.perf_counter()
            works[i]()
            elapsed = time.perf_counter() - began
            seconds[:, i] = sorted([*seconds[:, i], elapsed])[:2]
        is_steady = bool((seconds[1] <= _STEADY * seconds[0]).all())
        is_late = time.perf_counter() - start > _MAX_SECONDS
        if i_round + 1 >= _MIN_ROUNDS and (is_steady or is_late):
            break
    return seconds[0], is_steady
