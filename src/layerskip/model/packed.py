"""Quantized weights as they lie in memory: 4-bit codes in pairs, everything contiguous."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from layerskip.model.quantize import GROUP, Quantized

# Unpacked at a time: what fits into a processor's cache; a GPU needs much work a launch.
_BLOCK_WEIGHTS = {"cpu": 2**19, "cuda": 2**25}
_BLOCK_ROWS = 64  # a multiple of what kernels lay out together


@dataclasses.dataclass(frozen=True)
class Packed:
    """A `Quantized` weight matrix, packed.

    Attributes:
        bits: 8 or 4.
        codes: uint8, [out, in] for 8 bits and [out, in / 2] for 4 bits. Two codes share a byte as in
            GGML's blocks: byte j of a group holds its element j in the low and j + 16 in the high bits.
        scales: [out, in / GROUP] float16.
        offsets: the same, or None where the grid is centred on zero.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        n_out, n_groups = self.scales.shape
        return n_out, n_groups * GROUP

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and offsets."""
        return sum(t.nbytes for t in (self.codes, self.scales, self.offsets) if t is not None)

    def rows(self, index: Tensor | slice) -> "Packed":
        """Some of the rows."""
        offsets = None if self.offsets is None else self.offsets[index]
        return Packed(self.bits, self.codes[index], self.scales[index], offsets)

    def blocks(self) -> Iterator["Packed"]:
        """All rows in order, some at a time, so that unpacking them needs little memory."""
        n_out, n_in = self.shape
        at_a_time = _BLOCK_WEIGHTS.get(self.codes.device.type, _BLOCK_WEIGHTS["cpu"])
        step = max(1, at_a_time // n_in // _BLOCK_ROWS) * _BLOCK_ROWS
        return (self.rows(slice(start, start + step)) for start in range(0, n_out, step))

    def unpack(self) -> Quantized:
        """With one code a byte."""
        codes = nibbles(self.codes) if self.bits == 4 else self.codes
        return Quantized(self.bits, codes, self.scales, self.offsets)

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, [out, in] float32."""
        return self.unpack().dequantize()


def pack(weight: Quantized, device: torch.device | str = "cpu") -> Packed:
    """Pack a weight matrix and put it onto a device."""
    codes = weight.codes
    if weight.bits == 4:
        low, high = codes.unflatten(1, (-1, 2, GROUP // 2)).unbind(2)
        codes = (low | high << 4).flatten(1)
    offsets = weight.offsets
    return Packed(
        weight.bits,
        codes.to(device).contiguous(),
        weight.scales.to(device).contiguous(),
        None if offsets is None else offsets.to(device).contiguous(),
    )


def nibbles(codes: Tensor) -> Tensor:
    """The 4-bit codes in the bytes of `Packed.codes`: [out, in / 2] to [out, in] uint8."""
    pairs = codes.unflatten(1, (-1, GROUP // 2))
    return torch.cat([pairs & 15, pairs >> 4], dim=-1).flatten(1)
