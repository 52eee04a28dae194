"""Weights in 8 and 4 bits: one grid for loading, training and export.

Every `GROUP` neighbours of a row share a scale and an offset, both kept in float16:
value = code * scale + offset. A block of GGML's Q8_0, Q4_0 or Q4_1 is such a group, so those are taken
over without being rounded a second time; and what is quantized here can be written as one of them.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GROUP = 32
BITS = (8, 4)
EMBEDDING_BITS = 8  # of embedding and head, whatever the layers have
WEIGHTS: dict[str, int | None] = {"16bit": None, "int8": 8, "int4": 4}
"""How a decoder's weights can be kept, and the bits of those in its layers; None: in its dtype."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A weight matrix on the grid.

    Attributes:
        bits: 8 or 4.
        codes: [out, in] uint8, 0 to 2^bits - 1.
        scales: [out, in / GROUP] float16.
        offsets: [out, in / GROUP] float16; None = -2^(bits-1) * scale (the grid is centred on zero, and
            that product may be too large for float16).
    """

    bits: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.codes.shape

    def float_offsets(self) -> Tensor:
        """The offsets in float32, [out, in / GROUP]."""
        if self.offsets is None:
            return self.scales.float() * -(2 ** (self.bits - 1))
        return self.offsets.float()

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, [out, in] float32."""
        codes = self.codes.unflatten(1, (-1, GROUP)).float()
        groups = codes.mul_(self.scales.float()[..., None]).add_(self.float_offsets()[..., None])
        return groups.flatten(1)

    def in_8_bits(self) -> "Quantized":
        """The same numbers on the grid of 8 bits, of a grid of 4 that is centred on zero."""
        return Quantized(8, self.codes + (128 - 8), self.scales, None)

    def by_rows(self, change: Callable[[Tensor], Tensor]) -> "Quantized":
        """The same with its rows selected or reordered."""
        offsets = None if self.offsets is None else change(self.offsets)
        return Quantized(self.bits, change(self.codes), change(self.scales), offsets)


def bits_of(weights: str) -> int | None:
    """The bits that a key of `WEIGHTS` stands for.

    Raises:
        ValueError: it is none of them.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; there are: {', '.join(WEIGHTS)}")
    return WEIGHTS[weights]


def stack(parts: Sequence[Quantized]) -> Quantized:
    """The rows of several, one after the other; all have the same bits and as many columns.

    Where only some are centred on zero, theirs are written out as offsets. What is too large for
    float16 then cannot be stacked exactly, and all of it is quantized anew.
    """
    if len(parts) == 1:
        return parts[0]
    bits = parts[0].bits
    offsets = None
    if any(part.offsets is not None for part in parts):
        offsets = torch.cat([part.float_offsets() for part in parts]).to(torch.float16)
        if not offsets.isfinite().all():
            return quantize(torch.cat([part.dequantize() for part in parts]), bits)
    codes = torch.cat([part.codes for part in parts])
    return Quantized(bits, codes, torch.cat([part.scales for part in parts]), offsets)


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Round each group to the nearest points of its grid.

    8 bits are centred on zero and reach to the largest magnitude; 4 bits reach from the smallest to the
    largest value.

    Args:
        weight: [out, in], in a multiple of `GROUP`.
        bits: 8 or 4.

    Raises:
        ValueError: rows that cannot be cut into groups, or other bits.
    """
    groups = _groups(weight, bits)
    scales, offsets, lowest = _grid(groups, bits)
    codes = _codes(groups, scales, lowest, bits).to(torch.uint8)
    return Quantized(bits, codes.flatten(1), scales, offsets)


def on_grid(weight: Tensor, bits: int) -> Tensor:
    """The numbers of `quantize(weight, bits).dequantize()`, in float32, at a fraction of its time."""
    groups = _groups(weight, bits)
    scales, _, lowest = _grid(groups, bits)
    values = _codes(groups, scales, lowest, bits).mul_(scales.float()[..., None])
    return values.add_(lowest[..., None]).flatten(1)


def check_groups(shape: Sequence[int]) -> None:
    """Raise ValueError for a matrix whose rows cannot be cut into groups."""
    if shape[1] % GROUP:
        raise ValueError(
            f"rows of {shape[1]} weights cannot be cut into groups of {GROUP}; keep 16 bits"
        )


def _groups(weight: Tensor, bits: int) -> Tensor:
    """[out, in] to [out, in / GROUP, GROUP] in float32."""
    if bits not in BITS:
        raise ValueError(f"weights of {bits} bits are not supported; there are 8 and 4")
    check_groups(weight.shape)
    return weight.float().unflatten(1, (-1, GROUP))


def _grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Scale and offset of each group as they are stored, and the offset in float32."""
    least, most = torch.aminmax(groups, dim=-1)
    if bits == 8:
        scales = _half(torch.maximum(most, -least) / (2 ** (bits - 1) - 1))
        return scales, None, -(2 ** (bits - 1)) * scales.float()
    offsets = _half(least)
    scales = _half((most - offsets.float()) / (2**bits - 1))
    return scales, offsets, offsets.float()


def _codes(groups: Tensor, scales: Tensor, lowest: Tensor, bits: int) -> Tensor:
    """The nearest codes, still in float32."""
    steps = groups - lowest[..., None]
    return steps.div_(no_zero(scales.float())[..., None]).round_().clamp_(0, 2**bits - 1)


def _half(values: Tensor) -> Tensor:
    """To float16, clamped; infinity becomes NaN, so that damaged weights still show."""
    limit = torch.finfo(torch.float16).max
    values = torch.where(values.isinf(), torch.nan, values)
    return values.clamp(-limit, limit).to(torch.float16)


def no_zero(scales: Tensor) -> Tensor:
    """A group of equal values has the scale 0: any divisor gives the code of its offset."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
