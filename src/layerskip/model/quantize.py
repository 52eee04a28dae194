"""Quantized weights: matrices in GGML's blocks, and rounding to int8 and int4.

A quantized matrix has one form from the file to the layers: rows of GGML's blocks (`block_formats`).
Weights that are rounded here become blocks too, int8 Q8_0 and int4 Q4_1, where every `GROUP` neighbours
of a row share a scale, in int4 also an offset, in float16: value = code * scale + offset.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from layerskip.model.block_formats import FORMATS, BlockFormat, Grid

GROUP = 32
BITS = (8, 4)
INT4_KINDS = (Kind.Q4_0, Kind.Q4_1)  # blocks that int4 weights are kept in
EMBEDDING_BITS = 8  # of embedding and head, in int4 models too
STORED = "stored"
WEIGHTS: dict[str, int | None] = {STORED: None, "16bit": None, "int8": 8, "int4": 4}
"""Names of weight formats -> bits of the layers' matrices; None: not rounded.

"stored" keeps matrices in the blocks of a GGUF file; everything else is in the decoder's dtype, as with
"16bit".
"""

# Weights that are dequantized at a time: as many as fit into a CPU's cache; a GPU needs large launches.
_BLOCK_WEIGHTS = {"cpu": 2**19, "cuda": 2**25}
_BLOCK_ROWS = 64  # a multiple of the tiles of all kernels


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized weight matrix.

    Attributes:
        kind: the GGML type, a key of `FORMATS`.
        data: [out, bytes of a row] uint8.
    """

    kind: Kind
    data: Tensor

    @property
    def format(self) -> BlockFormat:
        """The format of its blocks."""
        return FORMATS[self.kind]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        blocks = self.data.shape[1] // self.format.block_bytes
        return self.data.shape[0], blocks * self.format.block_weights

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.data.nbytes

    def rows(self, index: Tensor | slice) -> "Quantized":
        """Select rows."""
        return Quantized(self.kind, self.data[index])

    def to(self, device: torch.device | str) -> "Quantized":
        """Copy the matrix to a device, out of the file's memory."""
        return Quantized(self.kind, self.data.to(device, copy=True))

    def blocks(self) -> Iterator["Quantized"]:
        """Yield all rows in order, in parts that need little memory when they are dequantized."""
        n_out, n_in = self.shape
        n_weights = _BLOCK_WEIGHTS.get(self.data.device.type, _BLOCK_WEIGHTS["cpu"])
        step = max(1, n_weights // n_in // _BLOCK_ROWS) * _BLOCK_ROWS
        return (self.rows(slice(start, start + step)) for start in range(0, n_out, step))

    def codes(self) -> Tensor:
        """Return the codes, [out, in] uint8."""
        return self.format.read_codes(self._blocks)

    def grid(self) -> Grid:
        """Return scales and offsets."""
        return self.format.read_grid(self._blocks)

    def dequantize(self) -> Tensor:
        """Return the weights, [out, in] float32."""
        codes, grid, block_format = self.codes(), self.grid(), self.format
        if block_format.table is None:
            values = codes.float()
        else:
            table = torch.tensor(block_format.table, dtype=torch.float32, device=codes.device)
            values = table[codes.int()]
        groups, offsets = values.unflatten(1, (-1, block_format.group)), grid.group_offsets()
        if offsets is None and block_format.table is None:
            groups -= 1 << (block_format.bits - 1)
        groups *= grid.group_scales()[..., None]
        if offsets is not None:
            groups += offsets[..., None]
        return groups.flatten(1)

    @property
    def _blocks(self) -> Tensor:
        return self.data.unflatten(1, (-1, self.format.block_bytes))


def to_int8(weight: Quantized) -> Quantized | None:
    """Return the same weights in Q8_0, or None if they do not fit its grid."""
    if weight.kind not in (Kind.Q8_0, Kind.Q4_0, Kind.Q5_0):
        return None
    if weight.kind == Kind.Q8_0:
        return weight
    codes = weight.codes() - (1 << (weight.format.bits - 1))  # modulo 256, that is int8
    return from_codes(Kind.Q8_0, codes ^ 128, weight.grid().scales)


def concat(parts: Sequence[Quantized]) -> Quantized:
    """Concatenate the rows of matrices in the same format."""
    if len(parts) == 1:
        return parts[0]
    return Quantized(parts[0].kind, torch.cat([part.data for part in parts]))


def bits_of(weights: str) -> int | None:
    """Return the bits of a key of `WEIGHTS`; ValueError for any other name."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; there are: {', '.join(WEIGHTS)}")
    return WEIGHTS[weights]


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Round each group to the nearest points of its grid.

    The int8 grid is centred on zero and reaches to the largest magnitude (Q8_0); the int4 grid reaches
    from the smallest to the largest value (Q4_1).

    Args:
        weight: [out, in], in a multiple of `GROUP`.
        bits: 8 or 4.

    Raises:
        ValueError: rows that cannot be split into groups, or other bits.
    """
    groups = _groups(weight, bits)
    scales, offsets, lowest = rounding_grid(groups, bits)
    codes = _codes(groups, scales, lowest, bits).to(torch.uint8).flatten(1)
    return from_codes(Kind.Q8_0 if bits == 8 else Kind.Q4_1, codes, scales, offsets)


def from_codes(
    kind: Kind, codes: Tensor, scales: Tensor, offsets: Tensor | None = None
) -> Quantized:
    """Write blocks of a scale, an offset and the codes for each group.

    Args:
        kind: Q8_0, Q4_0 (without offsets) or Q4_1 (with offsets).
        codes: [out, in] uint8.
        scales: [out, in / GROUP] float16.
        offsets: the same.
    """
    halves = [half[..., None] for half in (scales, offsets) if half is not None]
    head = torch.cat(halves, dim=-1).contiguous().view(torch.uint8)
    groups = codes.unflatten(1, (-1, GROUP))
    if kind == Kind.Q8_0:
        body = groups ^ 128
    else:
        low, high = groups.unflatten(2, (2, GROUP // 2)).unbind(2)
        body = low | high << 4
    return Quantized(kind, torch.cat([head, body], dim=-1).flatten(1))


def on_grid(weight: Tensor, bits: int) -> Tensor:
    """Return `quantize(weight, bits).dequantize()`, float32, in a fraction of its time."""
    groups = _groups(weight, bits)
    scales, _, lowest = rounding_grid(groups, bits)
    values = _codes(groups, scales, lowest, bits).mul_(scales.float()[..., None])
    return values.add_(lowest[..., None]).flatten(1)


def check_groups(shape: Sequence[int]) -> None:
    """Raise ValueError for a matrix whose rows cannot be split into groups."""
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


def rounding_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return scales and offsets of groups [..., GROUP] as they are stored, and the value of code 0."""
    smallest, largest = torch.aminmax(groups, dim=-1)
    if bits == 8:
        scales = _to_float16(torch.maximum(largest, -smallest) / (2 ** (bits - 1) - 1))
        return scales, None, -(2 ** (bits - 1)) * scales.float()
    offsets = _to_float16(smallest)
    scales = _to_float16((largest - offsets.float()) / (2**bits - 1))
    return scales, offsets, offsets.float()


def _codes(groups: Tensor, scales: Tensor, lowest: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, still in float32."""
    steps = groups - lowest[..., None]
    return steps.div_(no_zero(scales.float())[..., None]).round_().clamp_(0, 2**bits - 1)


def _to_float16(values: Tensor) -> Tensor:
    """Clamp finite values to float16; Inf becomes NaN, so that damaged weights still show."""
    limit = torch.finfo(torch.float16).max
    values = torch.where(values.isinf(), torch.nan, values)
    return values.clamp(-limit, limit).to(torch.float16)


def no_zero(scales: Tensor) -> Tensor:
    """Replace scales of 0 (a group of equal values, for which any divisor is right) by 1."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)
