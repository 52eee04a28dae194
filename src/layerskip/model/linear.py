"""Linear layers with their weights in the fastest layout for the machine, in PyTorch.

Part of the last step of loading (see `loader`): `linear`, `QuantizedLinear` and `ConcatLinear` hold
weights where they stay, on the decoder's device.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.quantize import GROUP, Quantized, quantize


class SlowWeightsWarning(UserWarning):
    """Quantized weights on a device without a fast kernel for them."""


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
    """A quantized weight: every format, every dtype, every device.

    Few rows of bfloat16 go through PyTorch's int4 kernel, on a CPU and on a GPU that has it, if the
    format fits it. All other inputs are multiplied with dequantized weights, a block of output rows at a
    time.

    Attributes:
        weight: the quantized weight.
        bias: [out] in the dtype of the inputs, or None.
        scale: of all outputs, before the bias is added.
    """

    def __init__(
        self, weight: Quantized, bias: Tensor | None, dtype: torch.dtype, scale: float = 1.0
    ) -> None:
        self.weight, self.bias, self.scale, self._dtype = weight, bias, scale, dtype
        has_kernel = fits_int4_kernel(weight) and _has_int4_kernel(weight.data.device, dtype)
        self._kernel = _Int4Kernel(weight) if has_kernel else None
        self.weight_bytes = weight.nbytes if self._kernel is None else self._kernel.nbytes

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        if self._kernel is not None and x.shape[0] <= _MAX_KERNEL_ROWS:
            y = self._kernel(x)
        else:
            values = (block.dequantize().to(x.dtype) for block in self.weight.blocks())
            y = torch.cat([F.linear(x, block) for block in values], dim=-1)
        y = y if self.scale == 1.0 else y * self.scale
        y = y if self.bias is None else y + self.bias
        return y if residual is None else y + residual

    def rows(self, index: Tensor) -> Matrix:
        """See `Matrix`."""
        bias = None if self.bias is None else self.bias[index]
        return QuantizedLinear(self.weight.rows(index), bias, self._dtype, self.scale)


class ConcatLinear:
    """Concatenates the outputs of layers of the same inputs, such as Q, K and V in several formats."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = parts
        self.weight_bytes = sum(part.weight_bytes for part in parts)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See `Linear`."""
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y if residual is None else y + residual


_MAX_KERNEL_ROWS = 48  # for more rows it is faster to dequantize once


class _Int4Kernel:
    """PyTorch's product of bfloat16 with int4 weights, in its own layouts for CPUs and for CUDA.

    On CUDA it is the kernel behind torchao's weight-only int4. Its weights are
    (code - 8) * scale + zero, with scale and zero in bfloat16. A code of 5 or 8 bits is 16 * high + low,
    so such a matrix is an int4 matrix of twice the width for a repeated input: the low halves beside the
    high ones, which have 16 times the scale.
    """

    _TILE_ROWS = 16

    def __init__(self, weight: Quantized) -> None:
        self._n_out, self._is_wide = weight.shape[0], weight.format.bits > 4
        on_cpu = weight.data.device.type == "cpu"
        self._arrange = _arrange_for_cpu if on_cpu else _arrange_for_cuda
        ops = torch.ops.aten
        self._product = ops._weight_int4pack_mm_for_cpu if on_cpu else ops._weight_int4pack_mm
        parts = [self._convert(block) for block in weight.blocks()]
        self._codes = torch.cat([codes for codes, _ in parts])
        self._scales = torch.cat([scales for _, scales in parts], dim=1)
        self.nbytes = self._codes.nbytes + self._scales.nbytes

    def _convert(self, weight: Quantized) -> tuple[Tensor, Tensor]:
        """Return codes in the kernel's layout, and scales and zeros [groups, out, 2]."""
        codes, grid = weight.codes(), weight.grid()
        scales, offsets = grid.group_scales(), grid.group_offsets()
        zeros = -scales * (1 << (weight.format.bits - 1)) if offsets is None else offsets
        if self._is_wide:  # high halves around 8, so that their zeros are small
            middle = 1 << (weight.format.bits - 5)
            codes = torch.cat([codes & 15, (codes >> 4) + (8 - middle)], dim=1)
            zeros = torch.cat([torch.zeros_like(zeros), zeros + (middle - 8) * 16 * scales], dim=1)
            scales = torch.cat([scales, 16 * scales], dim=1)
        scales_zeros = torch.stack([scales, zeros + 8 * scales], dim=-1).to(torch.bfloat16)
        padding = -codes.shape[0] % self._TILE_ROWS
        codes = F.pad(codes, (0, 0, 0, padding))
        scales_zeros = F.pad(scales_zeros, (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous()
        return self._arrange(codes), scales_zeros

    def __call__(self, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        x = torch.cat([x, x], dim=1) if self._is_wide else x
        y: Tensor = self._product(x.contiguous(), self._codes, GROUP, self._scales)
        return y[:, : self._n_out].contiguous()


def fits_int4_kernel(weight: Quantized) -> bool:
    """Return True if PyTorch's int4 kernel can multiply weights in this format."""
    return weight.format.group == GROUP and weight.format.table is None


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
        weight = quantize(torch.randn(16, 2 * GROUP, **options), 4).to(device)
        x = torch.randn(2, 2 * GROUP, **options).bfloat16().to(device)
        problem = _kernel_problem(weight, x)
    else:
        problem = "PyTorch's product with them is for bfloat16 alone"
    if problem is not None:
        message = f"quantized weights are slow on {device}: {problem}"
        warnings.warn(message, SlowWeightsWarning, stacklevel=2)
    return problem is None


def _kernel_problem(weight: Quantized, x: Tensor) -> str | None:
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
