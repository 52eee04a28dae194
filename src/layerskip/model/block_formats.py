"""GGML's block formats of quantized weights: where the bytes of a block hold codes, scales and offsets.

A format is a table of bit planes, so that one function reads the codes of all formats, and a function
for its scales. A weight is (code - centre) * scale, or code * scale + offset if its format has offsets;
both are the numbers that GGML computes, bit for bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor


class Plane(NamedTuple):
    """Some bits of all codes of a block.

    Its bytes are cut into runs. Byte j of a run of n bytes holds the weights j, j + n, j + 2n, ... of
    the run, the first one in its lowest bits.

    Attributes:
        begin: its first byte in the block.
        bits: of each code.
        run: bytes of a run.
    """

    begin: int
    bits: int
    run: int

    def read(self, blocks: Tensor, n: int) -> Tensor:
        """Return the bits of the n weights of each block, [..., bytes] to [..., n] uint8."""
        data = blocks[..., self.begin : self.begin + n * self.bits // 8]
        if self.bits == 8:
            return data
        shifts = torch.arange(0, 8, self.bits, dtype=torch.uint8, device=data.device)[:, None]
        runs = data.unflatten(-1, (-1, 1, self.run))
        return (runs >> shifts).bitwise_and_((1 << self.bits) - 1).flatten(-3)


class Grid(NamedTuple):
    """Scales and offsets of the groups of each row of blocks.

    A group's scale is `scales` (one for each group), or `scales` (one for each block) * `factors` (one
    for each group); the offsets likewise, or None.
    """

    scales: Tensor  # float16
    factors: Tensor | None = None  # int8
    offsets: Tensor | None = None
    offset_factors: Tensor | None = None

    def group_scales(self) -> Tensor:
        """Return the scale of every group, [..., groups] float32."""
        return _expanded(self.scales, self.factors)

    def group_offsets(self) -> Tensor | None:
        """Return the offset of every group, [..., groups] float32."""
        return None if self.offsets is None else _expanded(self.offsets, self.offset_factors)


def _expanded(halves: Tensor, factors: Tensor | None) -> Tensor:
    if factors is None:
        return halves.float()
    by_block = factors.unflatten(-1, (halves.shape[-1], -1)).float()
    return (by_block * halves.float()[..., None]).flatten(-2)


@dataclasses.dataclass(frozen=True)
class BlockFormat:
    """One of GGML's formats.

    Attributes:
        block_weights: weights of a block.
        block_bytes: bytes of a block.
        planes: of the codes, the low bits first.
        read_grid: scales and offsets of blocks [..., n, bytes]; per-group numbers have the shape
            [..., n * groups].
        group: weights that share a scale.
        table: the values that codes stand for; None = the codes themselves.
        is_signed: codes are stored as int8.
    """

    block_weights: int
    block_bytes: int
    planes: tuple[Plane, ...]
    read_grid: Callable[[Tensor], Grid]
    group: int = 32
    table: tuple[int, ...] | None = None
    is_signed: bool = False

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(plane.bits for plane in self.planes)

    def read_codes(self, blocks: Tensor) -> Tensor:
        """Return the codes of blocks, [..., blocks, bytes] to [..., weights] uint8."""
        n = self.block_weights
        first, *rest = self.planes
        codes, done = first.read(blocks, n), first.bits
        for plane in rest:
            codes |= plane.read(blocks, n) << done
            done += plane.bits
        return (codes ^ 128 if self.is_signed else codes).flatten(-2)


def _half(blocks: Tensor, begin: int) -> Tensor:
    """Return the float16 at a byte of each block, [..., n, bytes] to [..., n]."""
    return blocks[..., begin : begin + 2].contiguous().view(torch.float16).squeeze(-1)


def _simple(blocks: Tensor) -> Grid:
    return Grid(_half(blocks, 0))


def _with_offsets(blocks: Tensor) -> Grid:
    return Grid(_half(blocks, 0), None, _half(blocks, 2))


def _factors(values: Tensor) -> Tensor:
    return values.to(torch.int8).flatten(-2)


def _q2_k(blocks: Tensor) -> Grid:
    packed = blocks[..., :16]
    return Grid(
        *(_half(blocks, 80), _factors(packed & 15)),
        *(-_half(blocks, 82), _factors(packed >> 4)),
    )


def _q3_k(blocks: Tensor) -> Grid:
    factors = Plane(96, 4, 8).read(blocks, 16) | Plane(104, 2, 4).read(blocks, 16) << 4
    return Grid(_half(blocks, 108), _factors(factors) - 32)


def _q45_k(blocks: Tensor) -> Grid:
    """Read eight scales and eight minima of 6 bits from 12 bytes."""
    scales, minima, high = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    factors = torch.cat([scales & 63, high & 15 | scales >> 2 & 48], dim=-1)
    offset_factors = torch.cat([minima & 63, high >> 4 | minima >> 2 & 48], dim=-1)
    return Grid(
        *(_half(blocks, 0), _factors(factors)),
        *(-_half(blocks, 2), _factors(offset_factors)),
    )


def _q6_k(blocks: Tensor) -> Grid:
    return Grid(_half(blocks, 208), blocks[..., 192:208].contiguous().view(torch.int8).flatten(-2))


def _iq4_xs(blocks: Tensor) -> Grid:
    factors = Plane(4, 4, 1).read(blocks, 8) | Plane(2, 2, 1).read(blocks, 8) << 4
    return Grid(_half(blocks, 0), _factors(factors) - 32)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_TABLE: dict[Kind, tuple[tuple[Plane, ...], Callable[[Tensor], Grid], dict[str, Any]]] = {
    Kind.Q4_0: ((Plane(2, 4, 16),), _simple, {}),
    Kind.Q4_1: ((Plane(4, 4, 16),), _with_offsets, {}),
    Kind.Q5_0: ((Plane(6, 4, 16), Plane(2, 1, 1)), _simple, {}),
    Kind.Q5_1: ((Plane(8, 4, 16), Plane(4, 1, 1)), _with_offsets, {}),
    Kind.Q8_0: ((Plane(2, 8, 32),), _simple, {"is_signed": True}),
    Kind.Q2_K: ((Plane(16, 2, 32),), _q2_k, {"group": 16}),
    Kind.Q3_K: ((Plane(32, 2, 32), Plane(0, 1, 32)), _q3_k, {"group": 16}),
    Kind.Q4_K: ((Plane(16, 4, 32),), _q45_k, {}),
    Kind.Q5_K: ((Plane(48, 4, 32), Plane(16, 1, 32)), _q45_k, {}),
    Kind.Q6_K: ((Plane(0, 4, 64), Plane(128, 2, 32)), _q6_k, {"group": 16}),
    Kind.IQ4_NL: ((Plane(2, 4, 16),), _simple, {"table": _IQ4_VALUES}),
    Kind.IQ4_XS: ((Plane(8, 4, 16),), _iq4_xs, {"table": _IQ4_VALUES}),
}
FORMATS = {
    kind: BlockFormat(*gguf.GGML_QUANT_SIZES[kind], planes, read_grid, **rest)
    for kind, (planes, read_grid, rest) in _TABLE.items()
}
"""The formats whose weights can be kept as they are stored."""
