"""Weights packed in tiles of 16 outputs for `kernels.cpp`, in huge pages where Linux has them.

End of loading for the compiled kernels (see `loader`): a `PackedMatrix` is where its weights stay.

A tile holds, input by input, the weights of 16 outputs: [out / 16, words, 16], where a word has the
weights of one or several inputs that the kernels load together, or the scale of a group. Huge pages
spare TLB misses: Linux uses them for memory that was marked before it is first touched, 2 MB at a
multiple of 2 MB. Most matrices of a small model are smaller, so they share a block.
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

from layerskip.model.block_formats import BlockFormat
from layerskip.model.native.build import library, num_threads_to_use
from layerskip.model.native.team_size import team_size
from layerskip.model.quantize import GROUP, Quantized, quantize

LANES = 16
# Given to all tensors that C writes floats into, whatever PyTorch's default dtype and device are.
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
KINDS = {torch.float32: 0, torch.bfloat16: 1}
_TABLE4 = 9  # a quantized kind is otherwise its number of bits
_CHUNK_ROWS = 64 * LANES

_PAGE_BYTES = 2**21
_BLOCK_BYTES = 2**25  # an unused end of the last block is never touched, and takes no memory
_CACHE_LINE = 64


class LargePages:
    """Allocates tensors one behind the other in shared blocks; a block lives as long as any of them."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialized tensor on the CPU, as `torch.empty` does."""
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        aligned = -(-n_bytes // _CACHE_LINE) * _CACHE_LINE
        if aligned > _BLOCK_BYTES // 2:
            return in_large_pages(shape, dtype)
        if aligned > len(self._free):
            self._free = in_large_pages((_BLOCK_BYTES,), torch.uint8)
        tensor, self._free = self._free[:n_bytes], self._free[aligned:]
        return tensor.view(dtype).view(shape)


def in_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor in memory of its own, in huge pages on Linux."""
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    begin = -(-tensor.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    length = (tensor.data_ptr() + tensor.nbytes) // _PAGE_BYTES * _PAGE_BYTES - begin
    if sys.platform == "linux" and length > 0:
        with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
            address, size = ctypes.c_void_p(begin), ctypes.c_size_t(length)
            ctypes.CDLL(None).madvise(address, size, mmap.MADV_HUGEPAGE)
    return tensor


class MatrixStruct(ctypes.Structure):
    """`Matrix` of `products.h`."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
        ("offset_factors", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class LinearStruct(ctypes.Structure):
    """`Linear` of `products.h`."""

    _fields_ = (
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("n_parts", ctypes.c_int64),
        ("parts", ctypes.c_void_p),
    )


class BlocksStruct(ctypes.Structure):
    """`Blocks` of `products.h`."""

    _fields_ = (
        ("weights", ctypes.c_int32),
        ("bytes", ctypes.c_int32),
        ("n_planes", ctypes.c_int32),
        ("flip", ctypes.c_int32),
        ("planes", ctypes.c_int32 * 3 * 2),
    )

    @classmethod
    def of(cls, format: BlockFormat) -> "BlocksStruct":
        """Return the struct of a format."""
        planes = [(ctypes.c_int32 * 3)(*plane) for plane in format.planes]
        return cls(
            *(format.block_weights, format.block_bytes, len(planes)),
            *(128 if format.is_signed else 0, (ctypes.c_int32 * 3 * 2)(*planes)),
        )


class PackedMatrix:
    """A packed weight matrix with its product (a `linear.Matrix`).

    Args:
        weight: [out, in] in float32, bfloat16 or quantized; `in` is a multiple of 32.
        bias: [out], or None.
        pages: allocates the packed weights; None = in memory of their own.
        scale: of all outputs, before the bias is added.

    Attributes:
        shape: [out, in].
        weight_bytes: bytes that one call reads.
        matrix: for the kernels; valid as long as this object lives.
        struct: the same as the only part of a linear layer.
    """

    def __init__(
        self,
        weight: Tensor | Quantized,
        bias: Tensor | None = None,
        pages: LargePages | None = None,
        scale: float = 1.0,
    ) -> None:
        tiles = partial(_tiles, out=weight.shape[0], pages=pages)
        if isinstance(weight, Quantized):
            kind = _TABLE4 if weight.format.table else weight.format.bits
            tensors = _pack_quantized(weight, pages)
        else:
            kind = KINDS[weight.dtype]
            per_word = 1 if weight.dtype == torch.float32 else 2
            tensors = [tiles([weight.unflatten(1, (-1, per_word))]), None, None, None, None]
        self._set(kind, (weight.shape[0], weight.shape[1]), tensors, bias, scale)

    def _set(
        self,
        kind: int,
        shape: tuple[int, int],
        tensors: Sequence[Tensor | None],
        bias: Tensor | None,
        scale: float,
    ) -> None:
        self._library = library()
        self.shape, self._kind, self._scale, self._tensors = shape, kind, scale, tensors
        self._bias = None if bias is None else bias.float().contiguous()
        self.weight_bytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        pointers = (_pointer(tensor) for tensor in (*tensors, self._bias))
        self.matrix = MatrixStruct(kind, scale, *shape, *pointers)
        self.struct = LinearStruct(*shape, 1, ctypes.addressof(self.matrix))

    @property
    def scales(self) -> list[Tensor]:
        """The scales and the offsets of a quantized matrix."""
        return [numbers for numbers in self._tensors[1:3] if numbers is not None]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, in] (and a residual [N, out]) to [N, out], float32."""
        y = self.normed_product(x, None, 0.0)
        return y if residual is None else y + residual

    def normed_product(
        self, x: Tensor, norm: Tensor | None, eps: float, threads: int | None = None
    ) -> Tensor:
        """Multiply with the RMS norm of x, [N, in] to [N, out], float32; threads: None = `team_size`."""
        x = readable(x, self.shape[1])
        y = x.new_empty(x.shape[0], self.shape[0])
        self._library.layerskip_product(
            *(ctypes.byref(self.struct), _pointer(norm), eps, x.data_ptr(), x.shape[0]),
            *(y.data_ptr(), threads or team_size()),
        )
        return y

    def look_up(self, index: Tensor) -> Tensor:
        """Return rows, [...] to [..., in] float32; IndexError for an index outside of the matrix."""
        index = index.to("cpu", torch.int64).contiguous()
        rows = torch.empty(*index.shape, self.shape[1], **FLOATS)
        is_inside = self._library.layerskip_rows(
            ctypes.byref(self.struct), index.data_ptr(), index.numel(), rows.data_ptr()
        )
        if not is_inside:
            raise IndexError(f"a row number is outside of 0 to {self.shape[0] - 1}")
        return rows

    def rows(self, index: Tensor) -> "PackedMatrix":
        """See `Matrix`; copies a chunk at a time, so that only the result needs memory."""

        def select(tiles: Tensor) -> Tensor:
            if tiles.shape[-1] * tiles.itemsize == 4:
                tiles = tiles.view(torch.int32)  # copied as one number
            chunks = (tiles[rows // LANES, :, rows % LANES] for rows in index.split(_CHUNK_ROWS))
            return _tiles(chunks, len(index))

        tensors = [None if tensor is None else select(tensor) for tensor in self._tensors]
        matrix = PackedMatrix.__new__(PackedMatrix)
        bias = None if self._bias is None else self._bias[index]
        matrix._set(self._kind, (len(index), self.shape[1]), tensors, bias, self._scale)
        return matrix

    def in_int8(self) -> "PackedMatrix":
        """Return the matrix with weights in int8; itself if it is quantized."""
        if self._kind not in KINDS.values():
            return self
        weight = self.look_up(torch.arange(self.shape[0]))
        return PackedMatrix(quantize(weight, 8), self._bias)


class PackedLinear:
    """Packed matrices of the same inputs whose outputs follow one another (a `linear.Linear`).

    Their formats may differ; all but the last have a multiple of 16 outputs.
    """

    def __init__(self, parts: Sequence[PackedMatrix]) -> None:
        self._parts, (_, n_in) = parts, parts[0].shape
        self.weight_bytes = sum(part.weight_bytes for part in parts)
        self._matrices = (MatrixStruct * len(parts))(*(part.matrix for part in parts))
        n_out = sum(part.shape[0] for part in parts)
        self.struct = LinearStruct(n_out, n_in, len(parts), ctypes.addressof(self._matrices))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, in] (and a residual [N, out]) to [N, out], float32."""
        y = torch.cat([part(x) for part in self._parts], dim=1)
        return y if residual is None else y + residual


def choose(
    parts: "ctypes.Array[ctypes.c_void_p]",
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    *,
    threads: int,
    confident: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the argmax (the first) of the outputs of matrices for the RMS norm of x.

    No outputs are written to memory.

    Args:
        parts: the heads (`pointers_to`), of the same kind and width; their outputs are numbered
            consecutively.
        x: [N, in].
        norm: [in], or None.
        eps: of the norm.
        threads: how many.
        confident: compute the softmax probability of the argmax too.

    Returns:
        [N] int64, and [N] float32 or None.
    """
    first = ctypes.cast(parts, ctypes.POINTER(ctypes.POINTER(LinearStruct)))[0]
    x = readable(x, first.contents.in_)
    tokens = torch.empty(x.shape[0], dtype=torch.int64, device="cpu")
    probabilities = x.new_empty(x.shape[0]) if confident else None
    library().layerskip_choose(
        *(parts, len(parts), _pointer(norm), eps, x.data_ptr(), x.shape[0]),
        *(tokens.data_ptr(), _pointer(probabilities), threads),
    )
    return tokens, probabilities


def readable(x: Tensor, n_inputs: int) -> Tensor:
    """Return rows [N, in] as C reads them, in float32; ValueError for another width or device."""
    if x.shape[1:] != (n_inputs,) or x.device.type != "cpu":
        raise ValueError(
            f"inputs are [N, {n_inputs}] on the CPU; these are {list(x.shape)} on {x.device}"
        )
    return x.float().contiguous()


def pointers_to(parts: Sequence[PackedMatrix]) -> ctypes.Array[ctypes.c_void_p]:
    """Return pointers to the matrices' structs; valid as long as the matrices live."""
    return (ctypes.c_void_p * len(parts))(*(ctypes.addressof(part.struct) for part in parts))


class PackedEmbedding:
    """A packed matrix as token embedding (a `decoder.Embedding`); rows are float32."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self._matrix = matrix
        self.pointer = ctypes.addressof(matrix.struct)

    def __call__(self, tokens: Tensor) -> Tensor:
        """See `Embedding`."""
        return self._matrix.look_up(tokens)

    def head(self, token_ids: Tensor | None = None) -> PackedMatrix:
        """See `Embedding`; the whole matrix is not copied."""
        return self._matrix if token_ids is None else self._matrix.rows(token_ids)


def fits(n_inputs: int) -> bool:
    """Return True if rows of this many weights can be packed."""
    return n_inputs % GROUP == 0


def _tiles(chunks: Iterable[Tensor], out: int, pages: LargePages | None = None) -> Tensor:
    """Pack rows [n, words, k] of the chunks, `out` rows in all, to [tiles, words, 16, k].

    All chunks but the last have a multiple of 16 rows; the last tile is padded with zeros.
    """
    tiles: Tensor | None = None
    begin = 0
    for words in chunks:
        chunk = words
        n_rows, n_words, k = chunk.shape
        if tiles is None:
            empty = pages.empty if pages else in_large_pages
            tiles = empty((-(-out // LANES), n_words, LANES, k), chunk.dtype)
        target = tiles[begin:]
        if k * chunk.itemsize == 4 and chunk.storage_offset() % k == 0:
            chunk, target = (
                chunk.view(torch.int32),
                target.view(torch.int32),
            )  # copied as one number
        n_full = n_rows // LANES
        target[:n_full] = chunk[: n_full * LANES].unflatten(0, (n_full, LANES)).transpose(1, 2)
        if n_rows % LANES:
            target[n_full] = 0
            target[n_full, :, : n_rows % LANES] = chunk[n_full * LANES :].transpose(0, 1)
        begin += n_full
    assert tiles is not None
    return tiles


def _pack_quantized(weight: Quantized, pages: LargePages | None) -> list[Tensor | None]:
    """Return packed codes, scales, offsets, and the factors of both."""
    (n_out, n_in), bits = weight.shape, weight.format.bits
    empty = pages.empty if pages else in_large_pages
    codes = empty((-(-n_out // LANES), n_in // GROUP * bits, LANES, 1), torch.int32)
    blocks, threads = weight.data.contiguous(), num_threads_to_use()
    library().layerskip_pack(
        *(ctypes.byref(BlocksStruct.of(weight.format)), bits, blocks.data_ptr(), n_out, n_in),
        *(codes.data_ptr(), threads),
    )
    scales, factors, offsets, offset_factors = (
        None if part is None else _tiles([part[..., None]], n_out, pages) for part in weight.grid()
    )
    return [codes, scales, offsets, factors, offset_factors]


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
