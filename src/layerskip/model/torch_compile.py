"""Runs the layers through `torch.compile`, which captures short passes as CUDA graphs on a GPU."""

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from layerskip.model.architecture import Architecture
from layerskip.model.decoder import Decoder
from layerskip.model.kv_cache import CacheView, KVCache

MAX_POSITIONS = 32  # of a compiled pass: decoding steps, drafts and verification
MAX_CONTEXT = 4096
_MIN_CONTEXT = 256


def supports(architecture: Architecture, device: torch.device) -> bool:
    """Return True on CUDA, except for mixtures of experts, whose kernels depend on the input."""
    return device.type == "cuda" and architecture.mixture is None


class CompiledDecoder(Decoder):
    """A decoder whose short passes over one row are compiled with `mode="reduce-overhead"`.

    CUDA graphs read and write fixed addresses, so one KV cache at a time uses memory reserved at load.
    Long prompts, batches, further caches and threads other than the main one run eagerly, because
    PyTorch keeps its CUDA graphs by thread.
    """

    kernels = "torch.compile"

    def __init__(self, architecture: Architecture, **parts: Any) -> None:
        """See `Decoder`."""
        super().__init__(architecture, **parts)
        with torch.inference_mode(False):  # caches are created both inside and outside of it
            self._slots = super().new_cache(min(MAX_CONTEXT, architecture.max_context)).slots
        # Inductor writes in place to an input, but would copy the whole of a sliced one.
        self._layer_slots = self._slots.unbind(0)
        self._caches = weakref.WeakSet[KVCache]()  # those on the reserved memory: one at most
        for tensor in _tensors([self._layer_slots, self.layers, self.rotary]):
            torch._dynamo.mark_static_address(tensor, guard=False)  # not copied before a replay
        # Each part of the layers is one compilation, for one position and for several.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        self._compiled = torch.compile(self._pass, mode="reduce-overhead")

    def new_cache(self, capacity: int, batch_size: int = 1) -> KVCache:
        """See `Decoder`."""
        fits = batch_size == 1 and capacity <= self._slots.shape[-2]
        if not (fits and _in_main_thread()) or self._caches:
            return super().new_cache(capacity, batch_size)
        self._slots.zero_()  # a masked slot still enters the weighted sum
        cache = KVCache(
            self.architecture,
            capacity=capacity,
            dtype=self.cache_dtype,
            device=self.device,
            slots=self._slots,
        )
        self._caches.add(cache)
        return cache

    def run(self, hidden: Tensor, start: int, stop: int, cache: KVCache) -> Tensor:
        """See `Decoder`."""
        t = hidden.shape[1]
        is_short = cache.slots is self._slots and 0 < t <= MAX_POSITIONS and start < stop
        if not (is_short and _in_main_thread()):
            return super().run(hidden, start, stop, cache)
        self._check_layers(start, stop)
        end = cache.check_room(t)
        positions = torch.arange(end - t, end, device=hidden.device)[None]
        # Powers of two, since each value is captured once.
        reach = min(max(_MIN_CONTEXT, 1 << (end - 1).bit_length()), self._slots.shape[-2])
        torch.compiler.cudagraph_mark_step_begin()
        # The next replay overwrites its output.
        return self._compiled(hidden, start, stop, positions, reach, cache.capacity).clone()

    def _pass(
        self, hidden: Tensor, start: int, stop: int, positions: Tensor, reach: int, capacity: int
    ) -> Tensor:
        """Run layers over [1, T] positions, of which none lies at `reach` or above."""
        slots = self._layer_slots[start:stop]
        span = CacheView(
            positions=positions,
            end=reach,
            even=False,
            first_layer=start,
            head_dim=self.architecture.head_dim,
            writable=slots,
            keys=tuple(layer[0, ..., :reach, :] for layer in slots),
            values=tuple(layer[1, ..., :reach, :] for layer in slots),
        )
        return self.run_view(hidden, start, stop, span, capacity)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _tensors(part: Any) -> Iterator[Tensor]:
    """Yield all tensors in lists and in attributes of this package's objects, at any depth."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, list | tuple):
        for item in part:
            yield from _tensors(item)
    elif type(part).__module__.startswith("layerskip."):
        yield from _tensors(list(getattr(part, "__dict__", {}).values()))
