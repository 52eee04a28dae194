"""Matrix products with the weights laid out for the machine at hand."""

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody knows)
from torch import Tensor


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
