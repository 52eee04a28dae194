"""GGML's block formats: their numbers are those of the `gguf` package."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from quantized_blocks import KINDS, random_blocks

from layerskip.model.quantize import to_int8

kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@kinds
def test_weights_are_ggmls_bit_by_bit(kind):
    weight = random_blocks(kind, 20, 512)
    expected = torch.from_numpy(gguf.dequantize(weight.data.numpy(), kind))
    assert weight.shape == expected.shape == (20, 512)
    assert torch.equal(weight.dequantize().view(torch.int32), expected.view(torch.int32))


@kinds
def test_codes_have_their_bits(kind):
    weight = random_blocks(kind)
    codes = weight.codes()
    assert codes.shape == weight.shape
    assert len(codes.unique()) == 2**weight.format.bits


def test_rows_are_selected_and_cut_into_blocks():
    weight = random_blocks(Kind.Q5_K, 300, 4096)
    index, whole = torch.tensor([7, 0, 7]), weight.dequantize()
    assert torch.equal(weight.rows(index).dequantize(), whole[index])
    blocks = [block.dequantize() for block in weight.blocks()]
    assert len(blocks) > 1
    assert torch.equal(torch.cat(blocks), whole)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q5_0], ids=lambda kind: kind.name)
def test_centred_grids_are_exact_in_int8(kind):
    weight = random_blocks(kind)
    same = to_int8(weight)
    assert same.kind == Kind.Q8_0
    assert torch.equal(same.dequantize(), weight.dequantize())


def test_other_grids_are_not_those_of_int8():
    assert to_int8(random_blocks(Kind.Q4_K)) is None
