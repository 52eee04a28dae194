"""Weights in panels of 16 outputs, as `kernels.cpp` reads them.

Memory for weights in large pages, which processors find in one look where small ones take hundreds.

Linux gives large pages to memory that was marked before it is first touched, 2 MB that begin at a
multiple of 2 MB. Most matrices of a small model have no such stretch of their own, so they share.
"""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerskip.model.native.build import library, num_threads_to_use
from layerskip.model.quantize import GROUP, Quantized

_PAGE = 2**21
_SHARED_BYTES = 2**25  # the end of the last is not touched, and takes no memory
_LINE = 64  # of a processor's cache


class LargePages:
    """Hands out memory, piece behind piece; a stretch of it lives as long as any piece of it."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU that holds anything, as `torch.empty` makes it."""
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        taken = -(-n_bytes // _LINE) * _LINE
        if taken > _SHARED_BYTES // 2:
            return in_large_pages(shape, dtype)
        if taken > len(self._rest):
            self._rest = in_large_pages((_SHARED_BYTES,), torch.uint8)
        piece, self._rest = self._rest[:n_bytes], self._rest[taken:]
        return piece.view(dtype).view(shape)


def in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same in memory of its own; elsewhere than on Linux in the pages that there are."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    begin = -(-tensor.data_ptr() // _PAGE) * _PAGE
    length = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - begin
    if sys.platform == "linux" and length > 0:
        with contextlib.suppress(AttributeError, OSError):  # another C library: as they are
            address, size = ctypes.c_void_p(begin), ctypes.c_size_t(length)
            ctypes.CDLL(None).madvise(address, size, mmap.MADV_HUGEPAGE)
    return tensor


LANES = 16
# What C writes floats into, whatever PyTorch would make by default.
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
_MOVED_ROWS = 64 * LANES
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


class PackedMatrix:
    """A weight matrix with its product: `Matrix` of `linear.py`.

    Args:
        weight: [out, in] in float32, bfloat16 or on the grid; `in` in a multiple of 32.
        bias: [out], or None.
        pages: where the panels are to lie; None = in memory of their own.

    Attributes:
        shape: [out, in].
        weight_bytes: what one call reads.
        struct: what the kernels are given; valid as long as this object lives.
    """

    def __init__(
        self,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
        pages: LargePages | None = None,
    ) -> None:
        laid_out = partial(_panels, out=weight.shape[0], pages=pages)
        scales = offsets = None
        if isinstance(weight, Quantized):
            kind = _INT8 if weight.bits == 8 else _INT4
            data = laid_out([_words(weight)])
            scales = laid_out([weight.scales[..., None]])
            if weight.offsets is not None:
                offsets = laid_out([weight.offsets[..., None]])
        else:
            kind = KINDS[weight.dtype]
            together = 1 if weight.dtype == torch.float32 else 2
            data = laid_out([weight.unflatten(1, (-1, together))])
        self._hold(kind, (weight.shape[0], weight.shape[1]), (data, scales, offsets), bias)

    def _hold(
        self,
        kind: int,
        shape: tuple[int, int],
        panels: Sequence[Tensor | None],
        bias: Tensor | None,
    ) -> None:
        self._library = library()
        self.shape, self._kind, self._held = shape, kind, panels
        self._bias = None if bias is None else bias.float().contiguous()
        self.weight_bytes = sum(tensor.nbytes for tensor in panels if tensor is not None)
        self.struct = MatrixStruct(
            kind, *shape, *(_pointer(tensor) for tensor in (*panels, self._bias))
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, in] (and a residual [N, out]) to [N, out], float32."""
        y = self.normed_product(x, None, 0.0)
        return y if residual is None else y + residual

    def normed_product(
        self, x: Tensor, norm: Tensor | None, eps: float, threads: int | None = None
    ) -> Tensor:
        """The product with the RMS norm of x, [N, in] to [N, out], float32; threads: None = all."""
        x = readable(x, self.shape[1])
        y = x.new_empty(x.shape[0], self.shape[0])
        self._library.layerskip_product(
            ctypes.byref(self.struct),
            _pointer(norm),
            eps,
            x.data_ptr(),
            x.shape[0],
            y.data_ptr(),
            threads or num_threads_to_use(),
        )
        return y

    def look_up(self, index: Tensor) -> Tensor:
        """Rows by number, [...] to [..., in] float32; IndexError where there is none of that number."""
        index = index.to("cpu", torch.int64).contiguous()
        rows = torch.empty(*index.shape, self.shape[1], **FLOATS)
        are_there = self._library.layerskip_rows(
            ctypes.byref(self.struct), index.data_ptr(), index.numel(), rows.data_ptr()
        )
        if not are_there:
            raise IndexError(f"a row number is outside of 0 to {self.shape[0] - 1}")
        return rows

    def rows(self, index: Tensor) -> "PackedMatrix":
        """See `Matrix`. A few are moved at a time: no memory is needed but that of the result."""

        def picked(panels: Tensor) -> Tensor:
            if panels.shape[-1] * panels.itemsize == 4:
                panels = panels.view(torch.int32)  # moved as one number
            some = (panels[rows // LANES, :, rows % LANES] for rows in index.split(_MOVED_ROWS))
            return _panels(some, len(index))

        held = [None if panels is None else picked(panels) for panels in self._held]
        matrix = PackedMatrix.__new__(PackedMatrix)
        bias = None if self._bias is None else self._bias[index]
        matrix._hold(self._kind, (len(index), self.shape[1]), held, bias)
        return matrix


def choose(
    parts: "ctypes.Array[ctypes.c_void_p]",
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    *,
    threads: int,
    confident: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Which output of the RMS norm of x times some matrices is the highest: the first of them.

    Args:
        parts: where they are (`pointers_to`), of the same kind and width; their outputs are numbered on
            from one to the next.
        x: [N, in].
        norm: [in], or None.
        eps: of the norm.
        threads: how many.
        confident: whether to work out the softmax probability of the choice too.

    Returns:
        [N] int64, and [N] float32 or None. No outputs are written down.
    """
    first = ctypes.cast(parts, ctypes.POINTER(ctypes.POINTER(MatrixStruct)))[0]
    x = readable(x, first.contents.in_)
    chosen = torch.empty(x.shape[0], dtype=torch.int64, device="cpu")
    probabilities = x.new_empty(x.shape[0]) if confident else None
    library().layerskip_choose(
        *(parts, len(parts)),
        *(_pointer(norm), eps, x.data_ptr(), x.shape[0]),
        *(chosen.data_ptr(), _pointer(probabilities), threads),
    )
    return chosen, probabilities


def pointer_to(tensor: Tensor, row: int, i: int) -> int:
    """Where the numbers of a contiguous tensor [B, T, n] of floats begin, of one row and position."""
    return tensor.data_ptr() + 4 * (row * tensor.shape[1] + i) * tensor.shape[2]


def readable(x: Tensor, n_inputs: int) -> Tensor:
    """Rows [N, in] as C reads them, in float32; ValueError where they are not there or not so wide."""
    if x.shape[1:] != (n_inputs,) or x.device.type != "cpu":
        raise ValueError(
            f"inputs are [N, {n_inputs}] on the CPU; these are {list(x.shape)} on {x.device}"
        )
    return x.float().contiguous()


def pointers_to(parts: Sequence[PackedMatrix]) -> ctypes.Array[ctypes.c_void_p]:
    """Where the matrices are described; valid as long as they live."""
    return (ctypes.c_void_p * len(parts))(*(ctypes.addressof(part.struct) for part in parts))


class PackedEmbedding:
    """A matrix in panels as token embedding: `Embedding` of `embedding.py`; rows are float32."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._matrix = matrix
        self.pointer = ctypes.addressof(matrix.struct)

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        return self._matrix.look_up(tokens)

    def head(self, token_ids: Tensor | None = None) -> PackedMatrix:
        """See `Embedding`; the whole is not copied."""
        return self._matrix if token_ids is None else self._matrix.rows(token_ids)


def _panels(parts: Iterable[Tensor], out: int, pages: LargePages | None = None) -> Tensor:
    """Rows [n, k] of the parts, `out` in all, to [panels, n, 16, k]; zeros fill up the last panel.

    All parts but the last have a multiple of 16 rows.
    """
    laid: Tensor | None = None
    begin = 0
    for words in parts:
        rows, n, k = words.shape
        if laid is None:
            empty = pages.empty if pages else in_large_pages
            laid = empty((-(-out // LANES), n, LANES, k), words.dtype)
        to = laid[begin:]
        if k * words.itemsize == 4 and words.storage_offset() % k == 0:
            words, to = words.view(torch.int32), to.view(torch.int32)  # moved as one number
        whole = rows // LANES
        to[:whole] = words[: whole * LANES].unflatten(0, (whole, LANES)).transpose(1, 2)
        if rows % LANES:
            to[whole] = 0
            to[whole, :, : rows % LANES] = words[whole * LANES :].transpose(0, 1)
        begin += whole
    assert laid is not None
    return laid


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
