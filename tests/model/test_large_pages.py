"""Memory in large pages: pieces of shared stretches, marked for the kernel that asks for it."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerskip.model.native.packed import LargePages, in_large_pages

SMAPS = Path("/proc/self/smaps")


def flags_of(tensor: Tensor) -> set[str]:
    """The kernel's flags of the mapping that the middle of a tensor lies in."""
    at, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name and not name.endswith(":"):
            begin, end = (int(x, 16) for x in name.split("-"))
            inside = begin <= at < end
        elif inside and name == "VmFlags:":
            return set(rest.split())
    return set()


def test_pieces_lie_in_one_stretch_and_do_not_touch_one_another() -> None:
    pages = LargePages()
    shapes = [((3, 5), torch.bfloat16), ((7,), torch.uint8), ((2, 2, 9), torch.float32)]
    pieces = [pages.empty(shape, dtype) for shape, dtype in shapes]
    for number, piece in enumerate(pieces):
        piece.fill_(number + 1)
    for number, (piece, (shape, dtype)) in enumerate(zip(pieces, shapes, strict=True)):
        assert piece.shape == shape
        assert piece.dtype == dtype
        assert piece.is_contiguous()
        assert piece.data_ptr() % 64 == 0
        assert (piece == number + 1).all()
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 1


def test_a_full_stretch_is_followed_by_another() -> None:
    pages = LargePages()
    pieces = [pages.empty((3 * 2**20,), torch.uint8) for _ in range(12)]  # ten fit into 32 MB
    stretches = [piece.untyped_storage().data_ptr() for piece in pieces]
    assert stretches[0] == stretches[9]
    assert stretches[10] == stretches[11] != stretches[0]


def test_what_would_fill_most_of_a_stretch_has_its_own() -> None:
    pages = LargePages()
    small = pages.empty((8,), torch.uint8)
    large = pages.empty((2**25,), torch.float32)
    again = pages.empty((8,), torch.uint8)
    assert large.untyped_storage().nbytes() == large.nbytes
    assert again.data_ptr() == small.data_ptr() + 64


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has to be asked")
def test_the_kernel_is_asked_for_large_pages() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("this kernel has no large pages")
    one = in_large_pages((2**24,), torch.uint8)
    pages = LargePages()
    small = (2**20,)  # half of a page
    pieces = [pages.empty(small, torch.uint8) for _ in range(8)]
    assert "hg" in flags_of(one)
    assert "hg" in flags_of(pieces[4])
