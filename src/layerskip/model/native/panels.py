"""Weights in panels of 16 outputs, as `kernels.cpp` reads them."""

import ctypes

import torch
from torch import Tensor

from layerskip.model.native.build import library
from layerskip.model.quantize import GROUP, Quantized

LANES = 16
KINDS = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3


class MatrixStruct(ctypes.Structure):
    """`Matrix` of `kernels.cpp`."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class PanelMatrix:
    """A weight matrix with its product: `Matrix` of `linear.py`.

    Args:
        weight: [out, in] in float32, bfloat16 or on the grid; `in` in a multiple of 32.
        bias: [out], or None.

    Attributes:
        shape: [out, in].
        weight_bytes: what one call reads.
        struct: what the kernels are given; valid as long as this object lives.
    """

    def __init__(self, weight: Tensor | Quantized, bias: Tensor | None = None) -> None:
        self._library = library()
        self.shape = (weight.shape[0], weight.shape[1])
        self._scales = self._offsets = None
        if isinstance(weight, Quantized):
            self._kind = _INT8 if weight.bits == 8 else _INT4
            self._data = self._panels(_words(weight))
            self._scales = self._panels(weight.scales[..., None])
            if weight.offsets is not None:
                self._offsets = self._panels(weight.offsets[..., None])
        else:
            self._kind = KINDS[weight.dtype]
            together = 1 if weight.dtype == torch.float32 else 2
            self._data = self._panels(weight.unflatten(1, (-1, together)))
        self._bias = None if bias is None else bias.float().contiguous()
        held = (self._data, self._scales, self._offsets)
        self.weight_bytes = sum(tensor.nbytes for tensor in held if tensor is not None)
        self.struct = MatrixStruct(
            self._kind, *self.shape, *(_pointer(tensor) for tensor in (*held, self._bias))
        )

    def _panels(self, words: Tensor) -> Tensor:
        """[out, n, k] to [panels, n, 16, k], with the last panel filled up with zeros."""
        out, n, k = words.shape
        panels = -(-out // LANES)
        laid = torch.empty(panels, n, LANES, k, dtype=words.dtype)
        self._library.layerskip_large_pages(laid.data_ptr(), laid.nbytes)
        whole = out // LANES
        if k * words.itemsize == 4 and words.storage_offset() % k == 0:
            words, filled = words.view(torch.int32), laid.view(torch.int32)  # moved as one number
        else:
            filled = laid
        filled[:whole] = words[: whole * LANES].unflatten(0, (whole, LANES)).transpose(1, 2)
        if whole < panels:
            filled[whole] = 0
            filled[whole, :, : out % LANES] = words[whole * LANES :].transpose(0, 1)
        return laid

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, in] (and a residual [N, out]) to [N, out], float32."""
        y = self.normed_product(x, None, 0.0)
        return y if residual is None else y + residual

    def normed_product(self, x: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        """The product with the RMS norm of x, [N, in] to [N, out], float32."""
        x = x.float().contiguous()
        y = torch.empty(x.shape[0], self.shape[0])
        self._library.layerskip_product(
            ctypes.byref(self.struct),
            _pointer(norm),
            eps,
            x.data_ptr(),
            x.shape[0],
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def look_up(self, index: Tensor) -> Tensor:
        """Rows by number, [...] int64 to [..., in] float32."""
        index = index.contiguous()
        rows = torch.empty(*index.shape, self.shape[1])
        self._library.layerskip_rows(
            ctypes.byref(self.struct), index.data_ptr(), index.numel(), rows.data_ptr()
        )
        return rows

    def rows(self, index: Tensor) -> "PanelMatrix":
        """See `Matrix`."""
        bias = None if self._bias is None else self._bias[index]
        if self._scales is None:
            dtype = next(dtype for dtype, kind in KINDS.items() if kind == self._kind)
            return PanelMatrix(self.look_up(index).to(dtype), bias)
        return PanelMatrix(self._quantized_rows(index), bias)

    def _quantized_rows(self, index: Tensor) -> Quantized:
        def picked(panels: Tensor) -> Tensor:  # [panels, n, 16, k] to [len(index), n, k]
            return panels[index // LANES, :, index % LANES]

        assert self._scales is not None
        words = picked(self._data)
        if self._kind == _INT8:
            bits, codes = 8, words.flatten(1)
        else:
            bits, codes = 4, torch.cat([words & 15, words >> 4], dim=-1).flatten(1)
        offsets = None if self._offsets is None else picked(self._offsets).flatten(1)
        return Quantized(bits, codes, picked(self._scales).flatten(1), offsets)


class PanelEmbedding:
    """A matrix in panels as token embedding: `Embedding` of `embedding.py`; rows are float32."""

    def __init__(self, matrix: PanelMatrix) -> None:
        self._matrix = matrix

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        return self._matrix.look_up(tokens)

    def head(self, token_ids: Tensor | None = None) -> PanelMatrix:
        """See `Embedding`; the whole is not copied."""
        return self._matrix if token_ids is None else self._matrix.rows(token_ids)


def _words(weight: Quantized) -> Tensor:
    """The codes as [out, n, 4] bytes: four inputs, or eight in halves of bytes."""
    words: Tensor = weight.codes.unflatten(1, (-1, 4))
    if weight.bits == 4:
        low, high = words.unflatten(1, (-1, 2)).unbind(2)
        words = low | high << 4
    return words


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def fits(n_inputs: int) -> bool:
    """Whether rows of this many weights can be laid out."""
    return n_inputs % GROUP == 0
