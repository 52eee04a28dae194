"""Matrix products with the weights laid out for the machine at hand.

Weights in 8 and 4 bits: one grid for loading, training and export.

Every `GROUP` neighbours of a row share a scale and an offset, both kept in float16:
value = code * scale + offset. A block of GGML's Q8_0, Q4_0 or Q4_1 is such a group, so those are taken
over without being rounded a second time; and what is quantized here can be written as one of them.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
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


class SlowWeightsWarning(UserWarning):
    """8- or 4-bit weights on a device that has no product with them."""


class Linear(Protocol):
    """`x @ weight.T + bias`, and `+ residual` in the same call where one is given."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, in] (and a residual [N, out]) to [N, out]."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes that one call has to read."""
        ...


class Matrix(Linear, Protocol):
    """A `Linear` that is one weight matrix."""

    def rows(self, index: Tensor) -> "Matrix":
        """The product cut down to some of its outputs, [n] int64."""
        ...


class DenseLinear:
    """The weight as the checkpoint has it: every dtype, every device."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.weight_bytes = weight.nbytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y + residual

    def rows(self, index: Tensor) -> Matrix:
        """See `Matrix`."""
        return linear(self.weight[index], None if self.bias is None else self.bias[index])


class PackedLinear:
    """A 16-bit weight in oneDNN's blocked layout, which is read faster where there are few rows.

    oneDNN sums in float32 and adds the residual before it rounds to 16 bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = bias
        self.weight_bytes = weight.nbytes
        # Looked up here and not at import: a build of PyTorch without oneDNN does not have it.
        product = torch.ops.mkldnn._linear_pointwise
        self._product, self._product_and_sum = product.default, product.binary

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        if residual is None:
            y: Tensor = self._product(x, self.weight, self.bias, "none", (), "")
        else:
            y = self._product_and_sum(x, residual, self.weight, self.bias, "add")
        return y

    def rows(self, index: Tensor) -> Matrix:
        """See `Matrix`; the whole weight is unpacked for it."""
        weight = self.weight.to_dense()[index]
        return linear(weight, None if self.bias is None else self.bias[index])


class QuantizedLinear:
    """A weight in 8 or 4 bits: every dtype, every device.

    Few rows of bfloat16 take PyTorch's product with 4-bit weights, on a CPU and on a GPU that has it.
    All others multiply with the numbers that the codes stand for, which are made anew in every call, a
    block of rows at a time.

    Attributes:
        weight: the packed weight.
        bias: [out] in the dtype of the products, or None.
    """

    def __init__(self, weight: Packed, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.bias, self._dtype = weight, bias, dtype
        fits = _has_nibble_product(weight.codes.device, dtype)
        self._few = _NibbleProduct(weight) if fits else None
        self.weight_bytes = weight.nbytes if self._few is None else self._few.nbytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        if self._few is not None and x.shape[0] <= _FEW_ROWS:
            y = self._few(x)
        else:
            values = (block.dequantize().to(x.dtype) for block in self.weight.blocks())
            y = torch.cat([F.linear(x, block) for block in values], dim=-1)
        y = y if self.bias is None else y + self.bias
        return y if residual is None else y + residual

    def rows(self, index: Tensor) -> Matrix:
        """See `Matrix`."""
        bias = None if self.bias is None else self.bias[index]
        return QuantizedLinear(self.weight.rows(index), bias, self._dtype)


# From here on making the numbers once costs less than a product in 4 bits for each row.
_FEW_ROWS = 48


class _NibbleProduct:
    """PyTorch's product of bfloat16 with 4-bit weights, in a layout of its own for CPUs and for CUDA.

    On CUDA it is the one behind torchao's weight-only int4. Its numbers are (code - 8) * scale + zero,
    with scale and zero in bfloat16. An 8-bit code is 16 * high + low, so a matrix of them is one in 4
    bits and of twice the width, for twice the input: beside the low halves stand the high ones with 16
    times the scale.
    """

    _LINES = 16  # the layout has outputs in multiples of it

    def __init__(self, weight: Packed) -> None:
        self._n_out, self._is_double = weight.shape[0], weight.bits == 8
        on_cpu = weight.codes.device.type == "cpu"
        self._arrange = _arranged_for_cpu if on_cpu else _arranged_for_cuda
        ops = torch.ops.aten
        self._product = ops._weight_int4pack_mm_for_cpu if on_cpu else ops._weight_int4pack_mm
        parts = [self._lay_out(block) for block in weight.blocks()]
        self._codes = torch.cat([codes for codes, _ in parts])
        self._scales = torch.cat([scales for _, scales in parts], dim=1)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def _lay_out(self, weight: Packed) -> tuple[Tensor, Tensor]:
        """Codes in the product's layout, and scales and zeros [groups, out, 2]."""
        unpacked = weight.unpack()
        codes, scales, zeros = unpacked.codes, unpacked.scales.float(), unpacked.float_offsets()
        if self._is_double:
            codes = torch.cat([codes & 15, codes >> 4], dim=1)
            scales = torch.cat([scales, 16 * scales], dim=1)
            zeros = torch.cat([torch.zeros_like(zeros), zeros], dim=1)
        both = torch.stack([scales, zeros + 8 * scales], dim=-1).to(torch.bfloat16)
        missing = -codes.shape[0] % self._LINES
        codes = F.pad(codes, (0, 0, 0, missing))
        both = F.pad(both, (0, 0, 0, 0, 0, missing)).transpose(0, 1).contiguous()
        return self._arrange(codes), both

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        x = torch.cat([x, x], dim=1) if self._is_double else x
        y: Tensor = self._product(x.contiguous(), self._codes, GROUP, self._scales)
        return y[:, : self._n_out].contiguous()


def _arranged_for_cpu(codes: Tensor) -> Tensor:
    """4-bit codes [out, in] uint8 as the product on a CPU reads them."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def _arranged_for_cuda(codes: Tensor) -> Tensor:
    """4-bit codes [out, in] uint8 as the product on CUDA reads them, in tiles of 16 inputs."""
    n_in = codes.shape[1]
    tiles = next(n for n in (8, 4, 2) if n_in % (16 * n) == 0)  # groups of 32: 2 always fits
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)


@functools.cache
def _has_nibble_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's product with 4-bit weights runs on a device, and is right there.

    GPUs older than Ampere lack it, and what a build lacks shows in a call alone: it is tried once.
    """
    if device.type != "cuda":
        return device.type == "cpu" and dtype == torch.bfloat16
    if dtype == torch.bfloat16:
        chance: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
        weight = pack(quantize(torch.randn(16, 2 * GROUP, **chance), 4), device)
        x = torch.randn(2, 2 * GROUP, **chance).bfloat16().to(device)
        trouble = _trouble(weight, x)
    else:
        trouble = "PyTorch's product with them is for bfloat16 alone"
    if trouble is not None:
        what = f"8- and 4-bit weights are slow on {device}: {trouble}"
        warnings.warn(what, SlowWeightsWarning, stacklevel=2)
    return trouble is None


def _trouble(weight: Packed, x: Tensor) -> str | None:
    """What is wrong with the product of a weight and x, or None."""
    try:
        y = _NibbleProduct(weight)(x).float()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return str(error).split("\n")[0]
    exact = F.linear(x.float(), weight.dequantize())
    if torch.allclose(y, exact, rtol=0.02, atol=0.2):
        return None
    return "PyTorch's product with them is not exact"


def linear(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """The fastest product that this weight's dtype and device allow.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """
    if weight.device.type == "cpu" and _onednn_computes(weight.dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


def _onednn_computes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
