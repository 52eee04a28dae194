"""`Decoder` on a GPU: passes over a few positions are recorded as CUDA graphs and replayed.

Such a pass is hundreds of kernels of some microseconds each. Launching them one by one takes longer than
they do; a graph is launched once. It reads and writes fixed addresses: inputs are copied into it, and
caches are made over memory that graphs were recorded for. What changes from call to call lies on the
device: a pass knows its positions by a tensor, and attention reads up to the next power of two.
"""

import contextlib
import dataclasses
import gc
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerskip.model.architecture import Architecture
from layerskip.model.cache import KVCache, Span
from layerskip.model.decoder import Decoder

MOST_POSITIONS = 32  # of a pass that is recorded: plain steps, drafts and their verification
_LONGEST = 4096  # beyond so many slots attention without a mask is what takes the time
_SHORTEST = 256
_KEPT = 4  # memories of caches that have gone
_ROOM = 1024  # capacities of memory are multiples of it
# Held while anything is recorded: where one recording begins it waits for the whole device, which would
# break off another one.
_RECORDING = threading.Lock()

Outputs = tuple[Tensor, ...]
Record = Callable[[Callable[[], Outputs]], tuple[Callable[[], object], Outputs]]
"""Takes what launches kernels, gives what launches them all again and where they leave their results."""


def supports(architecture: Architecture, device: torch.device) -> bool:
    """Whether passes launch the same kernels for every input: experts do not, they are chosen."""
    return device.type == "cuda" and architecture.mixture is None


def recorder(device: torch.device) -> Record:
    """Records CUDA graphs. They share memory for what is only in between: results are copied at once."""
    pool = torch.cuda.graph_pool_handle()
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()  # one for all: memory is shared by stream
    capture = partial(torch.cuda.graph, pool=pool, stream=aside, capture_error_mode="thread_local")
    anchor: list[torch.cuda.CUDAGraph] = []  # the pool would end with the last graph that has it

    def record(function: Callable[[], Outputs]) -> tuple[Callable[[], object], Outputs]:
        graph = torch.cuda.CUDAGraph()
        # The current stream is set again even where a failed capture leaves another.
        with (
            _RECORDING,
            torch.cuda.device(device),
            torch.cuda.stream(torch.cuda.current_stream(device)),
        ):
            # What is chosen or made once is not to be recorded. But not on the stream of the captures:
            # cuBLAS's scratch memory there has to be the pool's own, which stays. Any other would be
            # freed with the first graph that ends, under those that still use it (PyTorch #193402).
            function()
            with _no_garbage_collected():
                if not anchor:
                    first = torch.cuda.CUDAGraph()
                    # What it makes for all later graphs of the process is to be of ordinary tensors.
                    with torch.inference_mode(False), capture(first):
                        torch.zeros(1, device=device)
                    anchor.append(first)
                with capture(graph):
                    outputs = function()
        return partial(_replay, graph, device), outputs

    return record


@contextlib.contextmanager
def _no_garbage_collected() -> Iterator[None]:
    """Graphs of a decoder that has gone may be garbage, and to let go of one would end a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _replay(graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
    with torch.cuda.device(device):
        graph.replay()


class Recorder:
    """What the recordings of one decoder share.

    Attributes:
        record: see `Record`; None where it has failed.
        pauses: whether nothing new is recorded until the next answer, since memory was short.
        lock: held while a recording is used, whose inputs and results have one place each.
    """

    def __init__(self, record: Record) -> None:
        self.record: Record | None = record
        self.pauses = False
        self.lock = threading.RLock()

    def fails(self, error: RuntimeError) -> None:
        """Take note that something could not be recorded, and say so."""
        cause = error.__context__ or error  # ending a failed capture fails too
        # Making what was recorded ready to run reports it as another class of error.
        of_memory = (
            isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e)
            for e in (error, cause)
        )
        if any(of_memory):
            self.pauses = True
        else:
            self.record = None
        warnings.warn(f"going on without CUDA graphs, more slowly: {cause}", stacklevel=3)


class Recordings:
    """Calls of functions of tensors, each recorded at its second call and replayed from then on.

    Several threads may call, on one stream.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._made: dict[Hashable, _Recording | None] = {}

    @torch.inference_mode()
    def __call__(self, key: Hashable, function: Callable[..., Outputs], *inputs: Tensor) -> Outputs:
        """`function(*inputs)`.

        Args:
            key: of functions that launch the same kernels for inputs of the same shapes.
            function: what it reads beside its inputs stays where it is.
            inputs: on the GPU.
        """
        key = (key, *((x.shape, x.dtype) for x in inputs))
        with self._recorder.lock:
            recorder = self._recorder
            if recorder.record is None or key not in self._made:
                self._made[key] = None  # a shape that comes once is not worth it
                return function(*inputs)
            made = self._made[key]
            if made is None and recorder.pauses:
                return function(*inputs)
            if made is None:
                try:
                    made = self._made[key] = _Recording(recorder.record, function, inputs)
                except RuntimeError as error:
                    recorder.fails(error)
            # Not before the error is gone, which holds the memory of what was not recorded.
            return function(*inputs) if made is None else made(*inputs)


class _Recording:
    """One recorded call. Results are copied, since the next one leaves its own in their place."""

    def __init__(
        self, record: Record, function: Callable[..., Outputs], inputs: tuple[Tensor, ...]
    ) -> None:
        self._inputs = tuple(x.clone() for x in inputs)
        self._replay, self._outputs = record(lambda: function(*self._inputs))
        expected = function(*self._inputs)
        if not all(map(_alike, self(*inputs), expected)):
            raise RuntimeError("a replayed graph has other results than what was recorded")

    def __call__(self, *inputs: Tensor) -> Outputs:
        for place, given in zip(self._inputs, inputs, strict=True):
            place.copy_(given)
        self._replay()
        return tuple(output.clone() for output in self._outputs)


def _alike(a: Tensor, b: Tensor) -> bool:
    """The same kernels over the same numbers: what differs is no rounding."""
    return torch.equal(a, b) or (
        a.is_floating_point() and torch.allclose(a, b, rtol=0.05, atol=0.05, equal_nan=True)
    )


@dataclasses.dataclass(eq=False)
class _Memory:
    """Slots that caches are made over, one after the other, and the passes recorded over them."""

    slots: Tensor
    recordings: Recordings


class GraphDecoder(Decoder):
    """The same decoder, for one row and few positions replayed."""

    kernels = "graphs"
    rehearsals = 2  # the second is recorded
    recorder = staticmethod(recorder)

    def __init__(self, architecture: Architecture, **parts: Any) -> None:
        """See `Decoder`."""
        super().__init__(architecture, **parts)
        self._recorder = Recorder(self.recorder(self.device))
        self._exits: Recordings | None = Recordings(self._recorder)
        self._in_use = weakref.WeakKeyDictionary[KVCache, _Memory]()
        self._free = deque[_Memory](maxlen=_KEPT)

    def new_cache(self, capacity: int, batch_size: int = 1) -> KVCache:
        """See `Decoder`; a cache of one row takes over the memory of one that has gone."""
        if batch_size != 1:
            return super().new_cache(capacity, batch_size)
        room = -(-capacity // _ROOM) * _ROOM
        with self._recorder.lock:
            free = list(self._free)
            memory = next((m for m in free if m.slots.shape[-2] >= capacity), None)
            if memory is not None:
                self._free.remove(memory)
            elif free and _is_kept(room):
                self._free.remove(free[0])  # which is too small: another is going to take its place
            self._recorder.pauses = False
        if memory is not None:
            memory.slots.zero_()  # a masked slot still enters the weighted sum
        else:
            with torch.inference_mode(False):  # whoever uses it next
                memory = _Memory(super().new_cache(room).slots, Recordings(self._recorder))
        cache = KVCache(
            self.architecture,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
            slots=memory.slots,
        )
        self._in_use[cache] = memory
        weakref.finalize(cache, _give_back, weakref.ref(self), memory).atexit = False
        return cache

    def run(self, hidden: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        """See `Decoder`."""
        memory, t = self._in_use.get(cache), hidden.shape[1]
        if memory is None or memory.slots is not cache.slots or not 0 < t <= MOST_POSITIONS:
            return super().run(hidden, start, stop, cache)
        end, capacity = cache.check_room(t), cache.capacity
        kept = _is_kept(memory.slots.shape[-2])
        is_worth_it = end <= _LONGEST and kept and self._recorder.record is not None
        looks_inside = start > 0 and stop < len(self.layers)  # which no decoding does
        if start >= stop or looks_inside or not is_worth_it:
            return super().run(hidden, start, stop, cache)
        self._check_layers(start, stop)
        slots = memory.slots[start:stop]
        reach = min(max(_SHORTEST, 1 << (end - 1).bit_length()), slots.shape[-2])

        def run(hidden: Tensor, begin: Tensor) -> Outputs:
            positions = begin + torch.arange(t, device=begin.device)[None]
            span = Span.over(slots, positions, reach, start)
            return (self._through(hidden, start, stop, span, capacity),)

        begin = torch.full((1, 1), end - t, device=hidden.device)
        key = (start, stop, reach, self.rotary.lengths(capacity))
        return memory.recordings(key, run, hidden, begin)[0]

    def choose(self, hidden: Tensor) -> Tensor:
        """See `Decoder`."""
        return self._exit("choose", lambda h: (Decoder.choose(self, h),), hidden)[0]

    def choose_with_probability(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """See `Decoder`."""
        chosen, probability = self._exit(
            "with probability", lambda h: Decoder.choose_with_probability(self, h), hidden
        )
        return chosen, probability

    def _exit(self, key: str, choose: Callable[[Tensor], Outputs], hidden: Tensor) -> Outputs:
        is_short = hidden.shape[0] == 1 and 0 < hidden.shape[1] <= MOST_POSITIONS
        if self._exits is None or not is_short:
            return choose(hidden)
        return self._exits(key, choose, hidden)

    def with_short_head(self, token_ids: Tensor) -> "Decoder":
        """See `Decoder`."""
        short = super().with_short_head(token_ids)
        return self._other(short, Recordings(self._recorder))

    def beside(self, other: "Decoder") -> "Decoder":
        """See `Decoder`; heads for the tokens of one prompt do not last long enough to be recorded."""
        return self._other(super().beside(other), None)

    def _other(self, copied: "Decoder", exits: Recordings | None) -> "Decoder":
        """A copy with another head, whose recordings go when it goes, and no memory."""
        assert isinstance(copied, GraphDecoder)
        copied._exits, copied._in_use = exits, weakref.WeakKeyDictionary()
        copied._free = deque(maxlen=_KEPT)
        return copied


def _give_back(decoder: "weakref.ref[GraphDecoder]", memory: _Memory) -> None:
    """A cache has gone: another may have its memory. Some are kept, for answers at the same time.

    This may happen at any place of any thread, so nothing is waited for.
    """
    alive = decoder()
    if alive is not None and _is_kept(memory.slots.shape[-2]):
        alive._free.append(memory)


def _is_kept(positions: int) -> bool:
    """Whether memory of this size is kept for later answers; only such memory is recorded.

    Much larger memory than recordings reach would be zeroed for each answer.
    """
    return positions <= _LONGEST + _ROOM
