"""Products with quantized weights, and the packed form that they are kept in."""

import pytest
import torch

from layerskip.model import quantize as linear
from layerskip.model.decoder import QuantizedEmbedding
from layerskip.model.quantize import GROUP, Quantized, QuantizedLinear, pack, quantize

BITS = pytest.mark.parametrize("bits", [8, 4])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(bits, centred, n_out=80, n_in=96):
    """A weight on the grid, centred on zero or with offsets."""
    made = quantize(random(n_out, n_in) + 0.3, bits)
    if centred:
        return Quantized(bits, made.codes, made.scales, None)
    offsets = (made.float_offsets() * 1.1).half()
    return Quantized(bits, made.codes, made.scales, offsets)


@BITS
@pytest.mark.parametrize("centred", [True, False])
def test_packed_is_the_same_weight(bits, centred):
    weight = grid(bits, centred)
    packed = pack(weight)
    assert packed.shape == weight.shape
    assert packed.codes.is_contiguous()
    assert packed.codes.shape == (80, 96 * bits // 8)
    assert packed.nbytes == 80 * (96 * bits // 8 + (2 if centred else 4) * 96 // GROUP)
    assert torch.equal(packed.unpack().codes, weight.codes)
    assert torch.equal(packed.dequantize(), weight.dequantize())
    index = torch.tensor([7, 0, 7])
    assert torch.equal(packed.rows(index).dequantize(), weight.dequantize()[index])
    blocks = [block.dequantize() for block in packed.blocks()]
    assert torch.equal(torch.cat(blocks), weight.dequantize())


def test_four_bits_lie_as_in_ggml():
    codes = torch.arange(2 * GROUP, dtype=torch.uint8)[None] % 16
    codes[0, 16:32] = 15 - codes[0, 16:32]
    scales = torch.ones(1, 2).half()
    packed = pack(Quantized(4, codes, scales, None)).codes[0]
    assert packed[:16].tolist() == [j | (15 - j) << 4 for j in range(16)]
    assert packed[16:].tolist() == [j | j << 4 for j in range(16)]


@BITS
@pytest.mark.parametrize(
    ("centred", "n_out", "n", "dtype"),
    [
        (True, 80, 1, torch.float32),
        (False, 7, 5, torch.float16),
        (False, 101, 48, torch.bfloat16),
        (True, 80, 49, torch.bfloat16),
    ],
)
def test_product_is_near_the_exact_one(bits, centred, n_out, n, dtype):
    weight = grid(bits, centred, n_out)
    x, residual = random(n, 96, seed=1).to(dtype), random(n, n_out, seed=2).to(dtype)
    bias = random(n_out, seed=3).to(dtype)
    product = QuantizedLinear(pack(weight), bias, dtype)
    exact = x.double() @ weight.dequantize().double().T + bias.double()
    for found, expected in ((product(x), exact), (product(x, residual), exact + residual.double())):
        assert found.dtype == dtype
        assert found.is_contiguous()
        # Weights, scales and results are rounded to the dtype.
        error = (found.double() - expected).std() / exact.std()
        assert error < {4: 1e-6, 2: 6e-3}[dtype.itemsize]
    some = torch.tensor([3, 0])
    torch.testing.assert_close(product.rows(some)(x), product(x)[:, some])


@BITS
def test_large_weights_are_multiplied_in_blocks(bits):
    weight = quantize(random(1030, 1024), bits)
    x = random(3, 1024, seed=1)
    found = QuantizedLinear(pack(weight), None, torch.float32)(x)
    torch.testing.assert_close(found, x @ weight.dequantize().T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float32), (4, torch.bfloat16)])
def test_embedding_looks_up_the_rows_asked_for(bits, dtype):
    weight = quantize(random(50, 64), bits)
    embedding = QuantizedEmbedding(pack(weight), dtype)
    tokens = torch.tensor([[3, 49, 3], [0, 1, 2]])
    assert torch.equal(embedding(tokens), weight.dequantize().to(dtype)[tokens])
    x = random(2, 64).to(dtype)
    index = torch.tensor([9, 4])
    torch.testing.assert_close(embedding.head(index)(x), embedding.head()(x)[:, index])


def as_on_cuda(monkeypatch):
    """Stand-ins for PyTorch's product on CUDA: of two codes in a byte the first has the high bits."""

    def product(x, arranged, group, scales_zeros):
        pairs, scales_zeros = arranged.flatten(1), scales_zeros.float()
        codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten(1).float()
        scales, zeros = scales_zeros.repeat_interleave(group, dim=0).unbind(-1)
        return (x.float() @ ((codes - 8) * scales.T + zeros.T).T).to(x.dtype)

    def convert(pairs, tiles):
        assert pairs.dtype == torch.uint8
        assert pairs.is_contiguous()
        assert tiles in (2, 4, 8)
        return pairs.unflatten(1, (-1, 8 * tiles))

    ops = torch.ops.aten
    monkeypatch.setattr(linear, "_arrange_for_cpu", linear._arrange_for_cuda)
    monkeypatch.setattr(ops, "_convert_weight_to_int4pack", convert, raising=False)
    monkeypatch.setattr(ops, "_weight_int4pack_mm_for_cpu", product, raising=False)


@BITS
@pytest.mark.parametrize(
    ("centred", "n_out", "n_in"), [(True, 80, 96), (False, 7, 128), (False, 2000, 576)]
)
def test_codes_are_arranged_for_the_product_on_cuda(bits, centred, n_out, n_in, monkeypatch):
    as_on_cuda(monkeypatch)
    weight = grid(bits, centred, n_out, n_in)
    x = random(3, n_in, seed=1).bfloat16()
    exact = x.double() @ weight.dequantize().double().T
    product = QuantizedLinear(pack(weight), None, torch.bfloat16)
    assert (product(x).double() - exact).std() < 6e-3 * exact.std()


def test_a_device_has_the_product_where_it_gives_what_it_should(monkeypatch):
    has_product = linear._has_int4_kernel
    assert has_product(torch.device("cpu"), torch.bfloat16)
    assert not has_product(torch.device("cpu"), torch.float32)
    assert not has_product(torch.device("mps"), torch.bfloat16)
    with pytest.warns(linear.SlowWeightsWarning, match="is for bfloat16 alone"):
        assert not has_product(torch.device("cuda"), torch.float16)
    weight, x, real = pack(grid(4, False)), random(2, 96).bfloat16(), linear._Int4Kernel
    assert linear._kernel_problem(weight, x) is None
    monkeypatch.setattr(linear, "_Int4Kernel", lambda weight: lambda x: 1.1 * real(weight)(x))
    assert linear._kernel_problem(weight, x) == "PyTorch's product with them is not exact"

    def missing(weight):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(linear, "_Int4Kernel", missing)
    assert linear._kernel_problem(weight, x) == "no kernel image"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@BITS
def test_product_on_a_gpu_is_near_the_exact_one(bits):
    weight = grid(bits, False, 2000, 576)
    product = QuantizedLinear(pack(weight, "cuda"), None, torch.bfloat16)
    assert product._kernel is not None
    for n in (1, 4, 48, 49):
        x = random(n, 576, seed=1).bfloat16()
        exact = x.double() @ weight.dequantize().double().T
        assert (product(x.cuda()).cpu().double() - exact).std() < 6e-3 * exact.std()
