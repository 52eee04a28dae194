"""Memory for weights in large pages, which processors find in one look where small ones take hundreds.

Linux gives large pages to memory that was marked before it is first touched, 2 MB that begin at a
multiple of 2 MB. Most matrices of a small model have no such stretch of their own, so they share.
"""

import contextlib
import ctypes
import mmap
import sys

import torch
from torch import Tensor

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
