"""Every family with int8 and int4 weights, and stored codes of GGUF files."""

import contextlib

import gguf_files
import pytest
import torch
from gguf import GGMLQuantizationType

import tiny_models
from layerskip.model import UnsupportedModelError, load
from layerskip.model.block_formats import FORMATS
from layerskip.model.decoder import DenseEmbedding, QuantizedEmbedding, interleave
from layerskip.model.linear import DenseLinear, QuantizedLinear
from layerskip.model.quantize import quantize
from layerskip.model.weights import GgufFile
from tiny_models import logits_of, token_ids

BITS = {"int8": 8, "int4": 4}
# Widths that are no groups of 32 in `tiny_models.CASES`.
CHANGES = {
    "qwen3-moe": {"moe_intermediate_size": 32},
}
CASES = ["llama-biases", "qwen2-tied", "gemma2", "phi3", "gpt-neox", "qwen3-moe"]


@pytest.fixture(params=BITS)
def weights(request):
    return request.param


def products(decoder):
    """All products of a decoder by a name, those inside of MLPs one by one."""
    for i, layer in enumerate(decoder.layers):
        yield f"{i}.qkv", layer.qkv
        yield f"{i}.attention_out", layer.attention_out
        yield from parts_of(f"{i}.mlp", layer.mlp)
    yield "head", decoder.head


def parts(product):
    """The parts of a linear layer in several formats, or with rows of several scales."""
    return getattr(product, "parts", [product])


def parts_of(name, mlp):
    if hasattr(mlp, "router"):
        yield f"{name}.router", mlp.router
        for number, expert in enumerate(mlp.experts):
            yield from parts_of(f"{name}.{number}", expert)
    else:
        yield f"{name}.in", mlp.gate_up
        yield f"{name}.down", mlp.down


@contextlib.contextmanager
def dense(decoder):
    """The same decoder, computing with the dequantized weights."""
    all_parts = [part for _, product in products(decoder) for part in parts(product)]
    quantized = [p for p in all_parts if isinstance(p, QuantizedLinear)]
    kept = QuantizedLinear.__call__
    values = {id(p): DenseLinear(p.weight.dequantize() * p.scale, p.bias) for p in quantized}
    embedding = decoder.embedding
    decoder.embedding = DenseEmbedding(embedding.weight.dequantize())
    QuantizedLinear.__call__ = lambda self, *x: values[id(self)](*x)
    try:
        yield
    finally:
        QuantizedLinear.__call__, decoder.embedding = kept, embedding


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_rounded_ones_and_logits_those_of_them(case, weights, tmp_path):
    tiny_models.build(case, **CHANGES.get(case, {})).save_pretrained(tmp_path)
    float32 = load(tmp_path, dtype=torch.float32).decoder
    decoder = load(tmp_path, dtype=torch.float32, weights=weights).decoder
    assert (decoder.weights, decoder.dtype) == (weights, torch.float32)

    assert isinstance(decoder.embedding, QuantizedEmbedding)
    expected = quantize(float32.embedding.weight, 8).dequantize()
    assert torch.equal(decoder.embedding.weight.dequantize(), expected)
    for (name, made), (_, whole) in zip(products(decoder), products(float32), strict=True):
        if name.endswith("router"):
            assert torch.equal(made.weight, whole.weight)
            continue
        bits = 8 if name == "head" else BITS[weights]
        sizes = [part.weight.shape[0] for part in parts(made)]
        for part, rows in zip(parts(made), whole.weight.split(sizes), strict=True):
            assert part.weight.format.bits == bits
            found, expected = part.weight.dequantize(), quantize(rows, bits).dequantize()
            if part.scale == 1.0:
                assert torch.equal(found, expected)
            else:  # rounded before they are scaled
                step = 2 * rows.abs().max() / (2**bits - 1)
                assert (found * part.scale - expected).abs().max() <= step
        biases = [part.bias for part in parts(made)]
        assert biases[0] is whole.bias is None or torch.equal(torch.cat(biases), whole.bias)

    tokens = token_ids(case, 2, 40)
    with dense(decoder):
        expected = logits_of(decoder, tokens)
    torch.testing.assert_close(logits_of(decoder, tokens), expected, rtol=0.0, atol=1e-4)
    assert (expected - logits_of(float32, tokens)).std() > 1e-3 * expected.std()  # another model


def test_bytes_of_a_step(weights, tmp_path):
    tiny_models.reference("llama2").save_pretrained(tmp_path)
    quantized = load(tmp_path, dtype=torch.float32, weights=weights).decoder.weight_bytes
    whole = load(tmp_path, dtype=torch.float32).decoder.weight_bytes
    head, layers = 96 * 64, whole // 4 - 96 * 64  # float32
    int8 = 1 + 2 / 32  # a code, and its part of a scale
    per_weight = {"int8": int8, "int4": 0.5 + 4 / 32}[weights]
    assert quantized == head * int8 + layers * per_weight


def test_rows_that_are_no_groups_are_refused(weights, tmp_path):
    tiny_models.reference("llama-narrow-heads").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"o_proj.weight .* 40 .* 32 .* 16bit"):
        load(tmp_path, dtype=torch.float32, weights=weights)


def test_bfloat16_is_near_float32(weights, tmp_path):
    tiny_models.reference("llama3.1").save_pretrained(tmp_path)
    tokens = token_ids("llama3.1", 1, 20)
    exact, near = (
        logits_of(load(tmp_path, dtype=dtype, weights=weights).decoder, tokens).float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (near - exact).std() < 20 * 2**-8 * exact.std()


# --- GGUF


def fitting(case="llama2"):
    return tiny_models.build(case, head_dim=32)


def build_wide(case):
    """Rows of 256, which K-quants need."""
    return tiny_models.build(
        case, head_dim=32, hidden_size=256, intermediate_size=256, num_attention_heads=8
    )


STORED_KINDS = [kind for kind in FORMATS if kind not in (GGMLQuantizationType.Q4_1,)]


@pytest.mark.parametrize("kind", gguf_files.KINDS, ids=lambda kind: kind.name)
def test_blocks_are_read_as_they_are(kind, tmp_path):
    gguf_files.write(tmp_path / "model.gguf", fitting(), kind=kind)
    file = GgufFile(tmp_path / "model.gguf")
    for name in file.names():
        made, values = file.quantized(name), file.read(name)
        if kind not in FORMATS or values.ndim == 1:
            assert made is None
            continue
        assert made.kind == kind
        assert torch.equal(made.dequantize(), values)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_stored_codes_are_taken_over(kind, tmp_path):
    model, path = fitting(), tmp_path / "model.gguf"
    state = gguf_files.write(path, model, kind=GGMLQuantizationType[kind])
    weights = "int8" if kind == "Q8_0" else "int4"
    decoder = load(path, dtype=torch.float32, weights=weights).decoder
    vocabulary = state["model.embed_tokens.weight"], state["lm_head.weight"]
    if kind == "Q4_1":  # these are in 8 bits in any case, without offsets
        vocabulary = [quantize(v, 8).dequantize() for v in vocabulary]
    assert torch.equal(decoder.embedding.weight.dequantize(), vocabulary[0])
    assert torch.equal(decoder.head.weight.dequantize(), vocabulary[1])
    for product, expected in gguf_files.layer_products(decoder, state):
        assert torch.equal(product.weight.dequantize(), expected)


def test_4_bits_centred_on_zero_are_exact_in_8(tmp_path):
    model, path = fitting(), tmp_path / "model.gguf"
    state = gguf_files.write(path, model, kind=GGMLQuantizationType.Q4_0)
    decoder = load(path, dtype=torch.float32, weights="int8").decoder
    assert torch.equal(decoder.head.weight.dequantize(), state["lm_head.weight"])
    for product, expected in gguf_files.layer_products(decoder, state):
        assert product.weight.kind == GGMLQuantizationType.Q8_0
        assert torch.equal(product.weight.dequantize(), expected)


def test_projections_stored_in_different_kinds_become_one(tmp_path):
    """Q with offsets, K centred, V in floats: the first two as they are, the third rounded."""
    model, path = fitting("qwen3"), tmp_path / "model.gguf"
    own = dict(zip("qkv", ("Q4_1", "Q4_0", "F16"), strict=True))
    kinds = {f"blk.0.attn_{x}.weight": GGMLQuantizationType[kind] for x, kind in own.items()}
    state = gguf_files.write(path, model, architecture="qwen3", kinds=kinds)
    decoder = load(path, dtype=torch.float32, weights="int4").decoder
    q, k, v = (state[f"model.layers.0.self_attn.{x}_proj.weight"] for x in "qkv")
    v = quantize(v, 4).dequantize()
    expected = torch.cat([interleave(q, 32, 32), interleave(k, 32, 32), v])
    assert torch.equal(gguf_files.weight_of(decoder.layers[0].qkv), expected)


# --- as stored


MIXED = {"attn_v": "Q8_0", "attn_k": "Q5_0", "ffn_up": "Q5_1", "attn_output": "Q4_0"}


@pytest.mark.parametrize("kind", STORED_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_stored_weights_are_those_of_the_file(kind, architecture, tmp_path):
    """With rows of Q and K in both orders, tied embeddings, and several formats in one product."""
    case = {"llama": "llama2", "qwen2": "qwen2-tied"}[architecture]
    model, path = build_wide(case), tmp_path / "model.gguf"
    kinds = {f"blk.1.{x}.weight": GGMLQuantizationType[other] for x, other in MIXED.items()}
    state = gguf_files.write(path, model, kind=kind, kinds=kinds, architecture=architecture)
    decoder = load(path, dtype=torch.float32, weights="stored").decoder
    assert decoder.weights == "stored"
    assert torch.equal(decoder.embedding.weight.dequantize(), state["model.embed_tokens.weight"])
    assert torch.equal(decoder.head.weight.dequantize(), state["lm_head.weight"])
    for product, expected in gguf_files.layer_products(decoder, state):
        assert torch.equal(gguf_files.weight_of(product), expected)


def test_a_product_with_floating_rows_is_not_quantized(tmp_path):
    model, path = fitting("qwen3"), tmp_path / "model.gguf"
    kinds = {"blk.0.attn_v.weight": GGMLQuantizationType.F16}
    state = gguf_files.write(
        path, model, architecture="qwen3", kind=GGMLQuantizationType.Q5_0, kinds=kinds
    )
    decoder = load(path, dtype=torch.float32, weights="stored").decoder
    assert isinstance(decoder.layers[0].qkv, DenseLinear)
    for product, expected in gguf_files.layer_products(decoder, state):
        assert torch.equal(gguf_files.weight_of(product), expected)


def test_stored_floats_are_16bit_weights(tmp_path):
    gguf_files.write(tmp_path / "m.gguf", fitting(), kind=GGMLQuantizationType.F16)
    fitting().save_pretrained(tmp_path / "safetensors")
    for path in (tmp_path / "m.gguf", tmp_path / "safetensors"):
        decoder = load(path, dtype=torch.float32, weights="stored").decoder
        assert decoder.weights == "16bit"
        assert isinstance(decoder.embedding, DenseEmbedding)
