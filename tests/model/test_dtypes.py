"""bfloat16 and float16 on the CPU: packed products, and whole models near float32."""

import pytest
import torch

from layerskip.model import load
from layerskip.model.decoder import Experts, HeadNorm
from layerskip.model.linear import DenseLinear, PackedLinear, linear
from tiny_models import LAYERS, build, reference, token_ids

DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # and half a unit in the last place


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def packed_makes(dtype):
    if not isinstance(linear(torch.zeros(8, 8, dtype=dtype)), PackedLinear):
        pytest.skip(f"oneDNN computes no {dtype} on this machine")
    return PackedLinear


@pytest.mark.parametrize(
    ("n", "with_bias", "with_residual"),
    [(1, False, False), (5, False, True), (17, True, True)],
)
def test_packed_product_is_the_rounded_exact_one(dtype, packed_makes, n, with_bias, with_residual):
    n_in, n_out = 96, 56
    weight = random(n_out, n_in, dtype=dtype, seed=1) / 8
    bias = random(n_out, dtype=dtype, seed=2) if with_bias else None
    residual = random(n, n_out, dtype=dtype, seed=3) if with_residual else None
    x = random(n, n_in, dtype=dtype, seed=4)
    exact = x.double() @ weight.double().T
    for part in (bias, residual):
        exact = exact if part is None else exact + part.double()
    untouched = None if residual is None else residual.clone()

    found = packed_makes(weight, bias)(x, residual)
    assert found.dtype == dtype
    # One rounding of the result; 1e-5 for the float32 sums before it.
    assert ((found.double() - exact).abs() <= DTYPES[dtype] * exact.abs() + 1e-5).all()
    assert residual is None or torch.equal(residual, untouched)  # it is not written into

    # The dense product rounds once more before it adds the residual.
    dense = DenseLinear(weight, bias)(x, residual).double()
    largest = exact.abs() + (0.0 if residual is None else residual.double().abs())
    assert ((found.double() - dense).abs() <= 4 * DTYPES[dtype] * largest + 1e-5).all()


def test_other_dtypes_are_dense():
    assert isinstance(linear(torch.zeros(8, 8)), DenseLinear)


# A rounding may send a row to another expert, and then all of its logits change.
CASES = [("mistral", torch.bfloat16), ("gemma3", torch.bfloat16), ("gpt-neox", torch.float16)]


@pytest.mark.parametrize(("case", "dtype"), CASES)
def test_logits_are_near_float32(case, dtype, tmp_path):
    reference(case).save_pretrained(tmp_path)
    tokens = token_ids(case, 2, 40)
    logits = {}
    for precision in (torch.float32, dtype):
        decoder = load(tmp_path, dtype=precision).decoder
        cache = decoder.new_cache(40, batch_size=2)
        parts = []
        for chunk in tokens.split([30, 1, 9], dim=1):
            hidden = decoder.run(decoder.embed(chunk), 0, LAYERS, cache)
            cache.lengths += chunk.shape[1]
            parts.append(decoder.logits(hidden))
        logits[precision] = torch.cat(parts, dim=1)
        assert {hidden.dtype, cache.slots.dtype, logits[precision].dtype} == {precision}
    error = logits[dtype].float() - logits[torch.float32]
    # Root mean square, of logits with a spread of about 1: roundings' worth over four layers.
    assert error.std() < 20 * DTYPES[dtype] * logits[torch.float32].std()


@pytest.mark.parametrize(
    ("case", "compiled"), [("gemma2", False), ("gemma3", False), ("gemma2-uncapped", True)]
)
def test_norms_with_an_offset_keep_small_weights_in_16_bits(case, compiled, tmp_path, request):
    if compiled:
        request.getfixturevalue("compiled_kernels")
    model = build(case)
    weight = model.model.layers[1].input_layernorm.weight.data.fill_(2.0**-10)
    model.save_pretrained(tmp_path)
    decoder = load(tmp_path, dtype=torch.bfloat16, compiled=compiled).decoder
    norm, x = decoder.layers[1].attention_norm, torch.randn(3, len(weight))
    assert torch.equal(norm.weight, 1 + weight)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_experts_are_added_up_before_the_residual():
    """Each alone is less than half a step of a residual of 128 in bfloat16; all eight are not."""
    x = torch.ones(3, 4, dtype=torch.bfloat16)
    router = linear(torch.zeros(8, 4, dtype=torch.bfloat16), None)
    small = [lambda rows: torch.full_like(rows, 3.2) for _ in range(8)]
    experts = Experts(router, small, top_k=8, normalized=True)
    assert (experts(x, 128 * x) == 131).all()


def test_shares_of_experts_are_not_rounded():
    x = torch.arange(1.0, 257)[None].bfloat16()
    share = torch.tensor([1.0, 0.0]).softmax(0)[0]
    experts = Experts(
        lambda rows: torch.tensor([[1.0, 0.0]]).expand(len(rows), 2),
        [lambda rows: rows, torch.zeros_like],
        top_k=2,
        normalized=True,
    )
    assert torch.equal(experts(x), (x * share).bfloat16())
    assert not torch.equal(experts(x), x * share.bfloat16())


def test_query_and_key_norms_round_once(dtype):
    weight = 1 + torch.randn(3, 8) / 16  # float32, as of Gemma
    x = torch.randn(5, 4 * 8).to(dtype)
    exact = torch.nn.functional.rms_norm(x.float().view(5, 4, 8)[:, :3], (8,), None, 1e-6) * weight
    assert torch.equal(HeadNorm(weight, 1e-6)(x).view(5, 4, 8)[:, :3], exact.to(dtype))
