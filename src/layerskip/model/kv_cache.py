"""The KV cache shared by drafting and verification: written at a position, read up to a length.

It is allocated once. Shortening it sets a length; nothing is copied (KVQ, section 4.3 of the paper).

In int8, each key and value of a head is quantized once, when it is written, with a scale of its own. So
drafts, verification and plain decoding read the same codes.
"""

import dataclasses
import math

import numpy as np
import torch
from torch import Tensor

from layerskip.model.architecture import Architecture

KV_CACHES = ("auto", "int8")
"""Precisions of keys and values; auto is the decoder's dtype."""
_TILE = 32  # positions: two packed tiles of the compiled kernels, which read them whole
_LINE = 64  # bytes of a cache line: unaligned vectors would need two
_LARGEST_CODE = 127
_SCALE_BYTES = 4  # a float32 behind the codes


def check_kv_cache(name: str) -> None:
    """Raise ValueError for other names than `KV_CACHES`."""
    if name not in KV_CACHES:
        raise ValueError(f"the KV cache is {name!r}; there are: {', '.join(KV_CACHES)}")


def quantize_states(states: Tensor) -> Tensor:
    """Return keys or values [..., head_dim] as int8 codes and their scale, [..., see `slot_width`].

    The largest magnitude has the code 127. Non-finite numbers become 0.
    """
    states = states.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    scale = states.abs().amax(dim=-1, keepdim=True) / _LARGEST_CODE
    codes = (states * torch.where(scale > 0, 1 / scale, 0.0)).round().to(torch.int8)
    padding = slot_width(codes.shape[-1], torch.int8) - codes.shape[-1] - _SCALE_BYTES
    codes = torch.nn.functional.pad(codes, (0, padding))
    return torch.cat([codes, scale.view(torch.int8)], dim=-1)


def dequantize_states(slots: Tensor, head_dim: int) -> Tensor:
    """Return the float32 values [..., head_dim] of what `quantize_states` returns."""
    return slots[..., :head_dim] * slots[..., -_SCALE_BYTES:].view(torch.float32)


def slot_width(head_dim: int, dtype: torch.dtype) -> int:
    """Return the numbers of a key or value in the cache: in int8 codes, padded, and a scale."""
    return -(-head_dim // 4) * 4 + _SCALE_BYTES if dtype == torch.int8 else head_dim


class KVCache:
    """Keys and values of every layer, with a length for every row.

    Attributes:
        capacity: S, how many positions a row can hold.
        slots: [L, 2, B, KV heads, S or more, `slot_width`]; index 0 of the second axis holds keys, 1
            values.
        head_dim: numbers of a key or value.
        lengths: [B] int64 on the host: the number of committed positions of each row. The next call of
            `Decoder.run` writes behind them. Set it back to forget positions.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        batch_size: int = 1,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        slots: Tensor | None = None,
    ) -> None:
        a = architecture
        width = slot_width(a.head_dim, dtype)
        shape = (a.n_layers, 2, batch_size, a.n_kv_heads, capacity, width)
        # Slots passed in may be larger; what they hold is overwritten before it is read.
        self.slots = _zeros(shape, dtype, torch.device(device)) if slots is None else slots
        self.capacity, self.head_dim = capacity, a.head_dim
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device="cpu")

    def take(self, other: "KVCache", length: int) -> None:
        """Copy the first positions of another cache, in whole tiles of the compiled kernels' layout."""
        room = min(self.slots.shape[-2], other.slots.shape[-2])
        used = min(-(-length // _TILE) * _TILE, room)
        self.slots[..., :used, :] = other.slots[..., :used, :]
        self.lengths.fill_(length)

    def check_room(self, n: int) -> int:
        """Return the end of the longest row after n more positions; raise ValueError if too long."""
        lengths: list[int] = self.lengths.tolist()
        end = max(lengths) + n
        if end > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} positions, {end} are needed")
        return end

    def span(self, n: int, first_layer: int, last_layer: int) -> "CacheView":
        """Return a view of the next n positions of every row, in layers [first_layer, last_layer).

        Raises:
            ValueError: a row has no room for them.
        """
        start, end = int(self.lengths.min()), self.check_room(n)
        slots = self.slots[first_layer:last_layer]
        if end - start == n:  # created on the device: copying would synchronize
            row = torch.arange(start, end, device=slots.device)
            positions, written = row.repeat(len(self.lengths), 1), slice(start, end)
        else:
            positions, written = self.lengths[:, None] + torch.arange(n, device="cpu"), None
            pinned = slots.device.type == "cuda"  # else the copy would synchronize
            positions = positions.pin_memory() if pinned else positions
            positions = positions.to(slots.device, non_blocking=pinned)
        return CacheView.over(slots, positions, end, first_layer, self.head_dim, written)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros: a masked slot still enters the weighted sum, where 0 * NaN would be NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # Pages that are zero until they are written: unused capacity takes no memory.
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.zeros(n_bytes + _LINE, np.uint8)
    begin = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[begin : begin + n_bytes]).view(dtype).view(shape)


@dataclasses.dataclass(frozen=True)
class CacheView:
    """The positions that one call of `Decoder.run` computes, and the slots that it accesses.

    All views of all layers are made at once: on a CPU, making them one by one costs as much as the
    attention itself.

    Attributes:
        positions: [B, T] int64.
        end: one more than the last position, or above that, since the mask goes by positions.
        even: whether all rows start at the same position.
        first_layer: the layer that the first entry of the last three belongs to.
        head_dim: numbers of a key or value.
        writable: a layer's slots [2, B, KV heads, T, width] at the positions (all S if not even).
        keys: [B, KV heads, end, width] a layer.
        values: like keys.
    """

    positions: Tensor
    end: int
    even: bool
    first_layer: int
    head_dim: int
    writable: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def over(
        cls,
        slots: Tensor,
        positions: Tensor,
        end: int,
        first_layer: int,
        head_dim: int,
        written: slice | None = None,
    ) -> "CacheView":
        """Return a view of positions in the slots of some layers [layers, 2, B, KV heads, S, width].

        `written` is the slice of the positions, if it is the same in all rows.
        """
        return cls(
            positions=positions,
            end=end,
            even=written is not None,
            first_layer=first_layer,
            head_dim=head_dim,
            writable=(slots if written is None else slots[..., written, :]).unbind(0),
            keys=slots[:, 0, ..., :end, :].unbind(0),
            values=slots[:, 1, ..., :end, :].unbind(0),
        )

    def write(self, layer: int, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's keys and values and return all up to the view's end.

        Args:
            layer: counted from 0.
            keys_values: [B, T, 2, KV heads, head_dim], in any floating dtype.

        Returns:
            keys and values, each [B, KV heads, end, head_dim]; float32 of an int8 cache.
        """
        index = layer - self.first_layer
        slots = self.writable[index]
        if slots.dtype == torch.int8:
            keys_values = quantize_states(keys_values)
        elif slots.dtype == torch.float16:
            # A rejected draft may have overflowed: masked values have to be finite.
            keys_values = keys_values.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.even:
            slots.copy_(keys_values.permute(2, 0, 3, 1, 4))
        else:
            rows = torch.arange(slots.shape[1], device=slots.device)[:, None]
            slots[:, rows, :, self.positions] = keys_values.to(slots.dtype)
        return self._read(self.keys[index]), self._read(self.values[index])

    def _read(self, slots: Tensor) -> Tensor:
        return dequantize_states(slots, self.head_dim) if slots.dtype == torch.int8 else slots

    def mask(self, window: int | None, dtype: torch.dtype, groups: int) -> Tensor | None:
        """Return the attention mask to add to the scores; None where every query sees all positions.

        Returns:
            [B, 1, groups * T, end]: queries of the `groups` heads that share a KV head follow one
            another in the third axis.
        """
        b, t = self.positions.shape
        sees_all = t == 1 and self.even and (window is None or window >= self.end)
        if sees_all:
            return None
        keys = torch.arange(self.end, device=self.positions.device)
        queries = self.positions[..., None]  # [B, T, 1]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        mask = torch.zeros(b, t, self.end, dtype=dtype, device=hidden.device)
        mask.masked_fill_(hidden, float("-inf"))
        return mask[:, None].expand(b, groups, t, self.end).reshape(b, 1, groups * t, self.end)
