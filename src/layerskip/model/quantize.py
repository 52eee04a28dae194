"""Int8 and int4 weights, and linear layers with their weights in the fastest layout for the machine.

One grid serves loading, training and export. Every `GROUP` neighbours of a row share a scale and an
offset, both in float16: value = code * scale + offset. A block of GGML's Q8_0, Q4_0 or Q4_1 is such a
group, so their codes are used as they are, and weights that are quantized here can be written as one of
them.

Part of the last step of loading (see `loader`): `linear` and `pack` put a weight where it stays, on the
decoder's device.
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
EMBEDDING_BITS = 8  # of embedding and head, in int4 models too
WEIGHTS: dict[str, int | None] = {"16bit": None, "int8": 8, "int4": 4}
"""Names of weight formats -> bits of the layers' matrices; None: the decoder's dtype."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized weight matrix, one code in each byte.

    Attributes:
        bits: 8 or 4.
        codes: [out, in] uint8, 0 to 2^bits - 1.
        scales: [out, in / GROUP] float16.
        offsets: [out, in / GROUP] float16; None = -2^(bits-1) * scale (a grid centred on zero, where
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
        """Return the offsets in float32, [out, in / GROUP]."""
        if self.offsets is None:
            return self.scales.float() * -(2 ** (self.bits - 1))
        return self.offsets.float()

    def dequantize(self) -> Tensor:
        """Return the weights, [out, in] float32."""
        codes = self.codes.unflatten(1, (-1, GROUP)).float()
        groups = codes.mul_(self.scales.float()[..., None]).add_(self.float_offsets()[..., None])
        return groups.flatten(1)

    def to_int8(self) -> "Quantized":
        """Return the same weights on the int8 grid; for a centred int4 grid."""
        return Quantized(8, self.codes + (128 - 8), self.scales, None)

    def map_rows(self, function: Callable[[Tensor], Tensor]) -> "Quantized":
        """Apply a selection or permutation of rows."""
        offsets = None if self.offsets is None else function(self.offsets)
        return Quantized(self.bits, function(self.codes), function(self.scales), offsets)


def bits_of(weights: str) -> int | None:
    """Return the bits of a key of `WEIGHTS`; ValueError for any other name."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; there are: {', '.join(WEIGHTS)}")
    return WEIGHTS[weights]


def concat(parts: Sequence[Quantized]) -> Quantized:
    """Concatenate the rows of matrices with the same bits and number of columns.

    If only some are centred on zero, their offsets become explicit. Offsets too large for float16
    cannot be concatenated exactly: then everything is quantized again.
    """
    if len(parts) == 1:
        return parts[0]
    bits, offsets = parts[0].bits, None
    if any(part.offsets is not None for part in parts):
        offsets = torch.cat([part.float_offsets() for part in parts]).to(torch.float16)
        if not offsets.isfinite().all():
            return quantize(torch.cat([part.dequantize() for part in parts]), bits)
    codes = torch.cat([part.codes for part in parts])
    return Quantized(bits, codes, torch.cat([part.scales for part in parts]), offsets)


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Round each group to the nearest points of its grid.

    The int8 grid is centred on zero and reaches to the largest magnitude; the int4 grid reaches from the
    smallest to the largest value.

    Args:
        weight: [out, in], in a multiple of `GROUP`.
        bits: 8 or 4.

    Raises:
        ValueError: rows that cannot be split into groups, or other bits.
    """
    groups = _groups(weight, bits)
    scales, offsets, lowest = _grid(groups, bits)
    codes = _codes(groups, scales, lowest, bits).to(torch.uint8)
    return Quantized(bits, codes.flatten(1), scales, offsets)


def on_grid(weight: Tensor, bits: int) -> Tensor:
    """Return `quantize(weight, bits).dequantize()`, float32, in a fraction of its time."""
    groups = _groups(weight, bits)
    scales, _, lowest = _grid(groups, bits)
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


def _grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return scales and offsets as they are stored, and the offsets in float32."""
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


# Weights that are unpacked at a time: as many as fit into a CPU's cache; a GPU needs large launches.
_BLOCK_WEIGHTS = {"cpu": 2**19, "cuda": 2**25}
_BLOCK_ROWS = 64  # a multiple of the tiles of all kernels


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantized weight matrix with int4 codes packed into bytes.

    Attributes:
        bits: 8 or 4.
        codes: uint8, [out, in] for int8 and [out, in / 2] for int4, where as in GGML's blocks byte j of
            a group holds its element j in the low and j + 16 in the high bits.
        scales: [out, in / GROUP] float16.
        offsets: the same, or None for a grid centred on zero.
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
        """Select rows."""
        offsets = None if self.offsets is None else self.offsets[index]
        return Packed(self.bits, self.codes[index], self.scales[index], offsets)

    def blocks(self) -> Iterator["Packed"]:
        """Yield all rows in order, in blocks that need little memory when they are unpacked."""
        n_out, n_in = self.shape
        n_weights = _BLOCK_WEIGHTS.get(self.codes.device.type, _BLOCK_WEIGHTS["cpu"])
        step = max(1, n_weights // n_in // _BLOCK_ROWS) * _BLOCK_ROWS
        return (self.rows(slice(start, start + step)) for start in range(0, n_out, step))

    def unpack(self) -> Quantized:
        """Return the matrix with one code in each byte."""
        codes = unpack_int4(self.codes) if self.bits == 4 else self.codes
        return Quantized(self.bits, codes, self.scales, self.offsets)

    def dequantize(self) -> Tensor:
        """Return the weights, [out, in] float32."""
        return self.unpack().dequantize()


def pack(weight: Quantized, device: torch.device | str = "cpu") -> Packed:
    """Pack a weight matrix and move it to a device."""
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


def unpack_int4(codes: Tensor) -> Tensor:
    """Unpack the bytes of `Packed.codes`: [out, in / 2] to [out, in] uint8."""
    pairs = codes.unflatten(1, (-1, GROUP // 2))
    return torch.cat([pairs & 15, pairs >> 4], dim=-1).flatten(1)


class SlowWeightsWarning(UserWarning):
    """Int8 or int4 weights on a device without a fast kernel for them."""


class Linear(Protocol):
    """Computes `x @ weight.T + bias`, plus a residual in the same call."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, in] (and a residual [N, out]) to [N, out]."""
        ...

    @property
    def weight_bytes(self) -> int:
        """Bytes that one call reads."""
        ...


class Matrix(Linear, Protocol):
    """A `Linear` with one weight matrix."""

    def rows(self, index: Tensor) -> "Matrix":
        """Return the layer with only some of its outputs, [n] int64."""
        ...


class DenseLinear:
    """The weight in row-major order, as in the checkpoint: every dtype, every device."""

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
    """A 16-bit weight in oneDNN's blocked layout, which is faster for few rows on a CPU.

    oneDNN accumulates in float32 and adds the residual before it rounds to 16 bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = bias
        self.weight_bytes = weight.nbytes
        # Not looked up at import: a PyTorch that was built without oneDNN does not have it.
        pointwise = torch.ops.mkldnn._linear_pointwise
        self._linear, self._linear_add = pointwise.default, pointwise.binary

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        if residual is None:
            y: Tensor = self._linear(x, self.weight, self.bias, "none", (), "")
        else:
            y = self._linear_add(x, residual, self.weight, self.bias, "add")
        return y

    def rows(self, index: Tensor) -> Matrix:
        """See `Matrix`; unpacks the whole weight once."""
        weight = self.weight.to_dense()[index]
        return linear(weight, None if self.bias is None else self.bias[index])


class QuantizedLinear:
    """An int8 or int4 weight: every dtype, every device.

    Few rows of bfloat16 go through PyTorch's int4 kernel, on a CPU and on a GPU that has it. All other
    inputs are multiplied with dequantized weights, a block of output rows at a time.

    Attributes:
        weight: the packed weight.
        bias: [out] in the dtype of the inputs, or None.
    """

    def __init__(self, weight: Packed, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight, self.bias, self._dtype = weight, bias, dtype
        has_kernel = _has_int4_kernel(weight.codes.device, dtype)
        self._kernel = _Int4Kernel(weight) if has_kernel else None
        self.weight_bytes = weight.nbytes if self._kernel is None else self._kernel.nbytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        if self._kernel is not None and x.shape[0] <= _MAX_KERNEL_ROWS:
            y = self._kernel(x)
        else:
            values = (block.dequantize().to(x.dtype) for block in self.weight.blocks())
            y = torch.cat([F.linear(x, block) for block in values], dim=-1)
        y = y if self.bias is None else y + self.bias
        return y if residual is None else y + residual

    def rows(self, index: Tensor) -> Matrix:
        """See `Matrix`."""
        bias = None if self.bias is None else self.bias[index]
        return QuantizedLinear(self.weight.rows(index), bias, self._dtype)


_MAX_KERNEL_ROWS = 48  # for more rows it is faster to dequantize once


class _Int4Kernel:
    """PyTorch's product of bfloat16 with int4 weights, in its own layouts for CPUs and for CUDA.

    On CUDA it is the kernel behind torchao's weight-only int4. Its weights are
    (code - 8) * scale + zero, with scale and zero in bfloat16. An int8 code is 16 * high + low, so an
    int8 matrix is an int4 matrix of twice the width for a repeated input: the low halves beside the high
    ones, which have 16 times the scale.
    """

    _TILE_ROWS = 16

    def __init__(self, weight: Packed) -> None:
        self._n_out, self._is_int8 = weight.shape[0], weight.bits == 8
        on_cpu = weight.codes.device.type == "cpu"
        self._arrange = _arrange_for_cpu if on_cpu else _arrange_for_cuda
        ops = torch.ops.aten
        self._product = ops._weight_int4pack_mm_for_cpu if on_cpu else ops._weight_int4pack_mm
        parts = [self._convert(block) for block in weight.blocks()]
        self._codes = torch.cat([codes for codes, _ in parts])
        self._scales = torch.cat([scales for _, scales in parts], dim=1)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def _convert(self, weight: Packed) -> tuple[Tensor, Tensor]:
        """Return codes in the kernel's layout, and scales and zeros [groups, out, 2]."""
        unpacked = weight.unpack()
        codes, scales, zeros = unpacked.codes, unpacked.scales.float(), unpacked.float_offsets()
        if self._is_int8:
            codes = torch.cat([codes & 15, codes >> 4], dim=1)
            scales = torch.cat([scales, 16 * scales], dim=1)
            zeros = torch.cat([torch.zeros_like(zeros), zeros], dim=1)
        scales_zeros = torch.stack([scales, zeros + 8 * scales], dim=-1).to(torch.bfloat16)
        padding = -codes.shape[0] % self._TILE_ROWS
        codes = F.pad(codes, (0, 0, 0, padding))
        scales_zeros = F.pad(scales_zeros, (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous()
        return self._arrange(codes), scales_zeros

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        x = torch.cat([x, x], dim=1) if self._is_int8 else x
        y: Tensor = self._product(x.contiguous(), self._codes, GROUP, self._scales)
        return y[:, : self._n_out].contiguous()


def _arrange_for_cpu(codes: Tensor) -> Tensor:
    """Convert int4 codes [out, in] uint8 to the layout of the CPU kernel."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


def _arrange_for_cuda(codes: Tensor) -> Tensor:
    """Convert int4 codes [out, in] uint8 to the layout of the CUDA kernel, in tiles of 16 inputs."""
    n_in = codes.shape[1]
    tiles = next(n for n in (8, 4, 2) if n_in % (16 * n) == 0)  # groups of 32: 2 always divides
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)


@functools.cache
def _has_int4_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if PyTorch's int4 kernel runs on a device, and computes correctly there.

    GPUs older than Ampere lack it, and a build of PyTorch may: only a call shows that, so it is tried
    once.
    """
    if device.type != "cuda":
        return device.type == "cpu" and dtype == torch.bfloat16
    if dtype == torch.bfloat16:
        options: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}
        weight = pack(quantize(torch.randn(16, 2 * GROUP, **options), 4), device)
        x = torch.randn(2, 2 * GROUP, **options).bfloat16().to(device)
        problem = _kernel_problem(weight, x)
    else:
        problem = "PyTorch's product with them is for bfloat16 alone"
    if problem is not None:
        message = f"8- and 4-bit weights are slow on {device}: {problem}"
        warnings.warn(message, SlowWeightsWarning, stacklevel=2)
    return problem is None


def _kernel_problem(weight: Packed, x: Tensor) -> str | None:
    """Return the reason why the kernel cannot multiply a weight with x, or None."""
    try:
        y = _Int4Kernel(weight)(x).float()
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        return str(error).split("\n")[0]
    exact = F.linear(x.float(), weight.dequantize())
    if torch.allclose(y, exact, rtol=0.02, atol=0.2):
        return None
    return "PyTorch's product with them is not exact"


def linear(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """Return the fastest linear layer for this weight's dtype and device.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """
    if weight.device.type == "cpu" and _onednn_supports(weight.dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


def _onednn_supports(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return False
