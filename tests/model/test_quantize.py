"""The grid of 8- and 4-bit weights."""

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from layerskip.model.quantize import GROUP, Quantized, on_grid, quantize


@pytest.mark.parametrize(("bits", "steps"), [(8, 254), (4, 15)])
def test_error_is_at_most_half_a_step(bits: int, steps: int) -> None:
    weight = torch.randn(16, 3 * GROUP, generator=torch.manual_seed(0))
    groups = weight.unflatten(1, (-1, GROUP))
    span = 2 * groups.abs().amax(-1) if bits == 8 else groups.amax(-1) - groups.amin(-1)
    half_step = span / steps / 2
    error = (quantize(weight, bits).dequantize() - weight).abs().unflatten(1, (-1, GROUP))
    # A float16 scale or offset is off by up to 2^-11 of itself, at worst over the whole span.
    assert (error.amax(-1) <= half_step + span * 2**-10).all()


def test_eight_bits_are_centred_and_four_bits_reach_from_least_to_most() -> None:
    weight = torch.linspace(-1, 3, GROUP)[None]
    eight, four = quantize(weight, 8), quantize(weight, 4)
    assert (eight.kind, four.kind) == (Kind.Q8_0, Kind.Q4_1)
    assert eight.codes().min() == 128 - round(127 / 3)
    assert eight.codes().max() == 255
    assert four.codes().min() == 0
    assert four.codes().max() == 15


@pytest.mark.parametrize("bits", [8, 4])
def test_equal_values_and_values_beyond_float16_stay_finite(bits):
    for value in (0.0, 0.5, 70_000.0):
        weight = torch.full((2, GROUP), value)
        read = quantize(weight, bits).dequantize()
        assert read.isfinite().all()
        if value < 60_000:
            torch.testing.assert_close(read, weight, rtol=1e-3, atol=0)


def test_largest_scales_are_exact_in_float32() -> None:
    scale = torch.tensor([60_000.0]).half()
    block = torch.cat([scale.view(torch.uint8), torch.full((GROUP,), 128, dtype=torch.uint8)])
    assert Quantized(Kind.Q8_0, block[None]).dequantize()[0, 0] == -128 * scale.float()


def test_rows_that_are_no_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        quantize(torch.zeros(2, 40), 8)
    with pytest.raises(ValueError, match="8 and 4"):
        quantize(torch.zeros(2, 64), 3)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_short_way_gives_the_same_numbers(bits: int) -> None:
    weight = torch.randn(16, 3 * GROUP, generator=torch.manual_seed(0))
    weight[0], weight[1] = 0.0, 0.3
    assert torch.equal(on_grid(weight, bits), quantize(weight, bits).dequantize())
