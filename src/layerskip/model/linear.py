"""Matrix products with the weights laid out for the machine at hand."""

import functools
import warnings
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.model.packed import Packed, pack
from layerskip.model.quantize import GROUP, quantize


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
