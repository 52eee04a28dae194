"""The compiled kernels: right numbers, and the same bits for any number of rows (batch invariance)."""

import ctypes
import itertools
import platform
import re
import subprocess
import sys
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import quantized_blocks
import torch
from gguf import GGMLQuantizationType as Kind

import tiny_models
from layerskip import LayerSkipModel
from layerskip.decoding.drafters import Draft, EarlyExit, ReducedHead, draft_by
from layerskip.decoding.sampling import Sampler, Sampling
from layerskip.model import load, loader
from layerskip.model.draft_rule import DraftRule
from layerskip.model.native import (
    NativeDecoder,
    NoCompilerError,
    PackedLinear,
    PackedMatrix,
    build,
    packed,
)
from layerskip.model.quantize import Quantized, quantize
from tiny_models import LAYERS

pytestmark = pytest.mark.usefixtures("compiled_kernels")
KINDS = ("float32", "bfloat16", "int8", "int4")
DECODERS = (*KINDS, "int8-cache")
# Relative errors: of sums alone, of inputs rounded to bfloat16, and of inputs rounded to int8.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2, "int8": 2e-2, "int4": 2e-2}
ROWS = 33


def long(value):
    return pytest.param(value, marks=pytest.mark.long)


@pytest.fixture(
    scope="module", params=["native", long("cascadelake"), "x86-64-v3", long("x86-64-v2")]
)
def kernels(request, tmp_path_factory):
    """The kernels of this CPU, and those of others: AVX-512 without bfloat16, AVX2, SSE."""
    request.getfixturevalue("compiled_kernels")
    if request.param == "native":
        return build.library()
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("of other CPUs")
    flags = re.search(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    needed = {"avx2", "fma", "f16c"}
    if request.param == "cascadelake":
        needed |= {f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl", "_vnni")}
    if flags is None or not needed <= set(flags[0].split()):
        pytest.skip("this CPU cannot run them")
    file = tmp_path_factory.mktemp("kernels") / f"{request.param}.so"
    command = [
        word.replace("-march=native", f"-march={request.param}") for word in build._compiler()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compiler", lambda: (*command, "-mfma"))
        try:
            build._compile(file)
        except NoCompilerError as error:
            pytest.skip(str(error))
    return build._load(file)


@pytest.fixture
def machine(kernels, monkeypatch):
    """Matrices and decoders use these kernels."""
    monkeypatch.setattr(packed, "library", lambda: kernels)
    monkeypatch.setattr("layerskip.model.native.native_decoder.library", lambda: kernels)


def matrix_of(kind, n_out, n_in, *, biased=False):
    """A random packed matrix, the same weights in float32, and its bias."""
    generator = torch.manual_seed(n_out + n_in)
    values = torch.randn(n_out, n_in, generator=generator)
    bias = torch.randn(n_out, generator=generator) if biased else None
    if kind.startswith("int"):
        weight = quantize(values, int(kind[3:]))
        return PackedMatrix(weight, bias), weight.dequantize(), bias
    weight = values.to(getattr(torch, kind))
    return PackedMatrix(weight, bias), weight.float(), bias


# --- products


@pytest.mark.parametrize("kind", KINDS)
def test_product(machine, kind):
    for shape, biased in (((16, 32), False), ((101, 96), True)):
        matrix, weight, bias = matrix_of(kind, *shape, biased=biased)
        x = torch.randn(ROWS, shape[1], generator=torch.manual_seed(0))
        expected = torch.nn.functional.linear(x, weight, bias)
        assert (matrix(x) - expected).norm() / expected.norm() < TOLERANCE[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_the_same_bits_alone_and_together(machine, kind):
    before = torch.get_num_threads()
    matrix, _, _ = matrix_of(kind, 400, 576, biased=True)
    x = torch.randn(ROWS, 576, generator=torch.manual_seed(0))
    alone = torch.cat([matrix(row) for row in x.split(1)])
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for n in range(1, ROWS + 1):
                assert torch.equal(matrix(x[:n]), alone[:n]), (threads, n)
    finally:
        torch.set_num_threads(before)


block_kinds = pytest.mark.parametrize("kind", quantized_blocks.KINDS, ids=lambda kind: kind.name)


@block_kinds
def test_blocks_of_gguf_files(machine, kind):
    """The same weights bit by bit, their product, and the same bits alone and together."""
    weight = quantized_blocks.random_blocks(kind, 101, 512)
    matrix, values = PackedMatrix(weight), weight.dequantize()
    assert torch.equal(matrix.look_up(torch.arange(101)), values)
    x = torch.randn(ROWS, 512, generator=torch.manual_seed(0))
    found, expected = matrix(x), x @ values.T
    assert (found - expected).norm() / expected.norm() < TOLERANCE["int8"]
    for n in (1, 2, 3, 5, 7, 13):
        alone = torch.cat([matrix(rows) for rows in x.split(n)])
        assert torch.equal(alone, found), n


@block_kinds
@pytest.mark.parametrize("rows", [1, 5])
def test_largest_codes_do_not_overflow(machine, kind, rows):
    """Of all bits set, and of none; inputs of the largest codes with signs as those of the weights."""
    weight = quantized_blocks.random_blocks(kind, 32, 256)
    data = weight.data.clone()
    for plane in weight.format.planes:
        length = weight.format.block_weights * plane.bits // 8
        for begin in range(plane.begin, data.shape[1], weight.format.block_bytes):
            data[:, begin : begin + length] = 0
            data[::2, begin : begin + length] = 127 if plane.bits == 8 else 255
    weight = Quantized(kind, data)
    matrix, values = PackedMatrix(weight), weight.dequantize()
    for x in (torch.ones(rows, 256), values[:rows].sign(), values[-rows:].sign()):
        expected = x @ values.T
        assert (matrix(x) - expected).abs().max() < 1e-5 * values.abs().sum(1).max()


def test_parts_in_several_formats_are_one_product(machine):
    kinds = [quantized_blocks.KINDS[i] for i in (0, 7, 9)]
    weights = [quantized_blocks.random_blocks(kind, 48, 256) for kind in kinds]
    bias, x = torch.randn(48), torch.randn(3, 256, generator=torch.manual_seed(0))
    parts = [PackedMatrix(w, bias, scale=0.5 + i) for i, w in enumerate(weights)]
    expected = torch.cat([(0.5 + i) * PackedMatrix(w)(x) + bias for i, w in enumerate(weights)], 1)
    torch.testing.assert_close(PackedLinear(parts)(x), expected, rtol=1e-5, atol=1e-5)


def test_scales_of_every_float16(machine):
    """Also on CPUs that flush subnormal float32 to 0."""
    scales = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[:, None]
    ones = torch.ones(2**16, 32, dtype=torch.uint8)
    matrix = PackedMatrix(Quantized(Kind.Q8_0, torch.cat([scales.view(torch.uint8), ones], dim=1)))
    expected = scales.float().expand(-1, 32)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            rows = matrix.look_up(torch.arange(2**16))
        finally:
            torch.set_flush_denormal(False)
        torch.testing.assert_close(rows, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_input_makes_all_outputs_non_finite(machine, kind):
    matrix, _, _ = matrix_of(kind, 48, 64)
    nan, ones, inf = 0x7FC00000, -1, 0x7F800000
    for i, bits in itertools.product((0, 15, 16, 30, 63), (nan, ones, inf)):
        x = torch.randn(3, 64, generator=torch.manual_seed(i))
        x.view(torch.int32)[1, i] = bits
        finite = matrix(x).isfinite()
        assert finite[[0, 2]].all()
        assert not finite[1].any()


@pytest.mark.parametrize(
    ("part", "kind", "number"),
    [
        ("input_layernorm", "float32", "nan"),
        ("self_attn.q_proj", "int8", "inf"),
        ("self_attn.k_proj", "bfloat16", "nan"),
        ("self_attn.v_proj", "int4", "-inf"),
        ("mlp.gate_proj", "float32", "inf"),
    ],
)
def test_damaged_weights_are_reported(part, kind, number, tmp_path, monkeypatch):
    """By their results, too: loading refuses them."""
    model = tiny_models.build("llama2")
    weight = model.get_parameter(f"model.layers.1.{part}.weight")
    weight.data.view(-1)[5] = float(number)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(loader, "check_finite", lambda name, tensor: None)
    how = {"weights": kind} if kind.startswith("int") else {"dtype": kind}
    for compile_ in (True, False):
        loaded = LayerSkipModel.from_pretrained(tmp_path, **how, compile=compile_)
        with pytest.raises(ValueError, match="weights are damaged"):
            loaded.generate([5, 6, 7], max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up_and_selected(kind):
    matrix, weight, _ = matrix_of(kind, 101, 96)
    index = torch.tensor([[100, 0, 17], [17, 16, 15]])
    assert torch.equal(matrix.look_up(index), weight[index])
    x = torch.randn(3, 96, generator=torch.manual_seed(0))
    reduced = matrix.rows(index[0])
    assert torch.equal(reduced(x), matrix(x)[:, index[0]])
    assert reduced.weight_bytes < matrix.weight_bytes


def test_too_little_memory_is_an_error():
    matrix, x = PackedMatrix(torch.ones(16, 32)), torch.ones(1, 32)
    with pytest.raises(MemoryError, match="no memory for so many positions"):
        build.library().layerskip_product(
            *(ctypes.byref(matrix.struct), None, 0.0, x.data_ptr(), 1 << 45, x.data_ptr(), 1)
        )


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_of_equal_logits_is_the_argmax(threads):
    """Over several blocks of outputs, and heads that end inside a tile."""
    weight = torch.zeros(5003, 32)
    weight[:, 0] = torch.arange(5003) % 41 * 0.25
    weight[4100, 1] = 1000.0
    parts = [PackedMatrix(weight[:2030].contiguous()), PackedMatrix(weight[2030:].contiguous())]
    x = torch.zeros(3, 32)
    x[:, 0], x[1, 1], x[2, 0] = 1.0, 1.0, -1.0
    tokens, probabilities = packed.choose(
        packed.pointers_to(parts), x, None, 0.0, threads=threads, confident=True
    )
    assert tokens.tolist() == [40, 4100, 0]
    torch.testing.assert_close(probabilities, (x @ weight.T).softmax(-1).amax(-1))


# --- the decoder


def saved(case, folder, **changes):
    """A tiny checkpoint whose early exits agree with its last layer now and then."""
    model = tiny_models.build(case, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            parameter.data *= 0.3
    model.save_pretrained(folder)
    return folder


def options_of(kind):
    """Loading options of a kind of decoder."""
    if kind in ("float32", "bfloat16"):
        return {"dtype": getattr(torch, kind)}
    return {
        "dtype": torch.bfloat16,
        **({"weights": kind} if kind in KINDS else {"kv_cache": "int8"}),
    }


def compiled(folder, kind):
    decoder = load(folder, **options_of(kind), compiled=True).decoder
    assert isinstance(decoder, NativeDecoder)
    return decoder


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("llama3.2", "float32"),
        ("mistral", "bfloat16"),
        ("qwen3-sliding", "int8"),
        ("mistral", "int4"),
        ("qwen3-sliding", "int8-cache"),
    ],
)
def test_passes_have_the_same_bits_in_any_pieces(case, kind, tmp_path):
    decoder = compiled(saved(case, tmp_path), kind)
    tokens = tiny_models.token_ids(case, 2, 70)
    logits = []
    for sizes in ([70], [1] * 70, [40, 1, 9, 2, 5, 1, 12]):
        cache, parts = decoder.new_cache(70, 2), []
        for chunk in tokens.split(sizes, dim=1):
            parts.append(decoder.run(decoder.embed(chunk), 0, LAYERS, cache))
            cache.lengths += chunk.shape[1]
        logits.append(decoder.logits(torch.cat(parts, dim=1)))
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


MIXED = {"attn_q": Kind.Q4_K, "attn_k": Kind.Q5_0, "attn_v": Kind.Q6_K, "ffn_down": Kind.Q4_K}


def stored(folder):
    """A file as llama.cpp makes them: several formats, also in one product, and a tied Q8_0 head."""
    model = tiny_models.build(
        "qwen2-tied", head_dim=32, hidden_size=256, intermediate_size=256, num_attention_heads=8
    )
    for parameter in model.parameters():
        parameter.data *= 0.5
    kinds = {f"blk.{i}.{x}.weight": kind for i in range(LAYERS) for x, kind in MIXED.items()}
    kinds["token_embd.weight"] = Kind.Q8_0
    path = folder / "model.gguf"
    gguf_files.write(path, model, kind=Kind.Q5_0, kinds=kinds, architecture="qwen2")
    return path


def test_stored_weights_decode_like_their_values(tmp_path):
    """Near the same weights in float32, and self-speculative decoding equals plain decoding."""
    path = stored(tmp_path)
    exact = load(path, dtype=torch.float32).decoder
    native = load(path, dtype=torch.float32, weights="stored", compiled=True).decoder
    assert isinstance(native, NativeDecoder)
    assert any(isinstance(layer.qkv, PackedLinear) for layer in native.layers)
    assert native.weight_bytes < exact.weight_bytes / 4
    tokens = tiny_models.token_ids("qwen2-tied", 1, 60)
    logits = [tiny_models.logits_of(decoder, tokens) for decoder in (native, exact)]
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < 0.05
    model = LayerSkipModel.from_pretrained(path, compile=True)
    assert model.decoder.weights == "stored"
    options = {"max_new_tokens": 30, "ignore_eos": True}
    plain = model.generate([7], mode="plain", **options).token_ids
    for d in (1, 4):
        drafting = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": d}
        assert model.generate([7], **drafting, **options).token_ids == plain


@pytest.mark.parametrize(
    ("case", "kind"),
    [("llama3.2", "float32"), ("qwen3-sliding", "bfloat16"), ("llama3.2", "int8-cache")],
)
def test_long_contexts_have_the_same_bits_however_threads_share_them(case, kind, tmp_path):
    """Few positions are split by their context, many by their heads."""
    decoder = compiled(saved(case, tmp_path), kind)
    tokens = tiny_models.token_ids(case, 1, 400)
    hidden, before = [], torch.get_num_threads()
    try:
        for threads, sizes in (
            (1, [400]),
            (2, [400]),
            (1, [120, 1, 7, 1, 2, 125, 1, 3, 40, 80, 5, 15]),
            (2, [120, 1, 7, 1, 2, 125, 1, 3, 40, 80, 5, 15]),
        ):
            torch.set_num_threads(threads)
            cache, parts = decoder.new_cache(400), []
            for chunk in tokens.split(sizes, dim=1):
                parts.append(decoder.run(decoder.embed(chunk), 0, LAYERS, cache))
                cache.lengths += chunk.shape[1]
            hidden.append(torch.cat(parts, dim=1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(hidden[0], other) for other in hidden[1:])


@pytest.mark.parametrize(
    ("case", "kind", "n"),
    [("llama3.2", "float32", 1), ("qwen3-sliding", "bfloat16", 5), ("llama3.2", "int8-cache", 5)],
)
def test_long_contexts_of_several_lengths_in_a_batch(case, kind, n, tmp_path):
    decoder = compiled(saved(case, tmp_path), kind)
    tokens, lengths = tiny_models.token_ids(case, 3, 400), (390, 130, 260)
    batch, alone = decoder.new_cache(400, 3), []
    decoder.run(decoder.embed(tokens), 0, LAYERS, batch)
    batch.lengths = torch.tensor(lengths)
    for row, length in enumerate(lengths):
        cache = decoder.new_cache(400)
        decoder.run(decoder.embed(tokens[row : row + 1, :length]), 0, LAYERS, cache)
        cache.lengths += length
        alone.append(decoder.run(decoder.embed(tokens[row : row + 1, :n]), 0, LAYERS, cache))
    hidden = decoder.run(decoder.embed(tokens[:, :n]), 0, LAYERS, batch)
    assert torch.equal(hidden, torch.cat(alone))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_position_behind_the_cache_may_be_non_finite(machine, kind, tmp_path, monkeypatch):
    """As in a draft that is rejected."""
    model = tiny_models.build("llama2")
    model.get_input_embeddings().weight.data[90] = float("nan")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(loader, "check_finite", lambda name, tensor: None)
    decoder = compiled(tmp_path, kind)
    plain, drafted = decoder.new_cache(8), decoder.new_cache(8)

    def run(cache, *tokens):
        hidden = decoder.run(decoder.embed(torch.tensor([tokens])), 0, LAYERS, cache)
        cache.lengths += len(tokens)
        return hidden

    expected = run(plain, 5, 6)
    hidden = run(drafted, 5, 6, 90, 8)
    assert torch.equal(hidden[:, :2], expected)
    assert not hidden[:, 2:].isfinite().any()
    drafted.lengths -= 2
    assert torch.equal(run(drafted, 7), run(plain, 7))


@pytest.mark.parametrize("kind", DECODERS)
def test_self_speculative_equals_plain_in_every_type(kind, tmp_path):
    saved("qwen3-sliding", tmp_path)
    model = LayerSkipModel.from_pretrained(tmp_path, **options_of(kind), compile=True)
    options = {"max_new_tokens": 40, "ignore_eos": True}
    for prompt in ([7], list(range(3, 33))):
        plain = model.generate(prompt, mode="plain", **options).token_ids
        for exit_layer, d in itertools.product((1, LAYERS - 1), (1, 4)):
            drafting = {"mode": "self-speculative", "exit_layer": exit_layer, "draft_tokens": d}
            output = model.generate(prompt, **drafting, **options)
            assert output.token_ids == plain, (exit_layer, d)


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_is_near_that_of_pytorch(kind, tmp_path):
    saved("qwen3-sliding", tmp_path)
    native = compiled(tmp_path, kind)
    how = {} if kind in ("float32", "bfloat16") else {"weights": kind}
    pytorch = load(tmp_path, dtype=torch.float32, **how).decoder
    tokens = tiny_models.token_ids("qwen3-sliding", 1, 300)
    logits = [
        d.logits(d.run(d.embed(tokens), 0, LAYERS, d.new_cache(300))) for d in (native, pytorch)
    ]
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < 0.05


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
def test_weights_share_a_block_of_huge_pages(kind, tmp_path):
    decoder = compiled(saved("llama3.2", tmp_path), kind)
    tensors = [
        tensor
        for layer in decoder.layers
        for part in (layer.qkv, layer.attention_out, layer.mlp.gate_up, layer.mlp.down)
        for tensor in part._tensors
        if tensor is not None
    ]
    assert len(tensors) >= 2 * len(decoder.layers)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


capped = pytest.mark.parametrize(
    ("kind", "cap"), [("float32", 3.0), ("bfloat16", None), ("int8", 3.0), ("int4", None)]
)


@capped
def test_greedy_tokens_are_the_argmax_of_the_logits(cap, kind, tmp_path):
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    hidden = torch.randn(2, 5, decoder.architecture.hidden_size, generator=torch.manual_seed(0))
    logits = decoder.logits(hidden)
    few, more = torch.arange(50, 90), torch.tensor([3, 5])
    reduced = decoder.with_reduced_head(few).concat_heads(decoder.with_reduced_head(more))
    for exit_, scores in ((decoder, logits), (reduced, logits[..., torch.cat([few, more])])):
        assert torch.equal(exit_.logits(hidden), scores)
        assert torch.equal(exit_.greedy_tokens(hidden), scores.argmax(-1))


@capped
def test_a_greedy_step_is_a_pass_and_an_argmax(cap, kind, tmp_path):
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    for tokens, stop in (
        (torch.tensor([[7]]), LAYERS),
        (torch.tensor([[7, 8, 9]]), 2),
        (torch.tensor([[7], [30]], dtype=torch.int32), 2),
        (torch.tensor([[7]]), 0),
    ):
        cache = decoder.new_cache(12, len(tokens))
        expected = decoder.run(decoder.embed(tokens), 0, stop, cache)
        logits = decoder.logits(expected[:, -1:])
        hidden, token, confidence = decoder.greedy_step(tokens, stop, cache, with_confidence=True)
        assert torch.equal(hidden, expected)
        assert torch.equal(token, logits.argmax(-1))
        assert confidence == pytest.approx(float(logits[0, 0].softmax(-1).max()), rel=1e-4)


@capped
def test_a_greedy_pass_goes_on_from_any_layer_and_scores_several_positions(cap, kind, tmp_path):
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    entering = torch.randn(1, 4, decoder.architecture.hidden_size, generator=torch.manual_seed(0))
    for layers in ((0, LAYERS), (1, LAYERS), (2, 2)):
        for n_scored in (1, 4):
            cache = decoder.new_cache(12)
            expected = decoder.run(entering, *layers, cache)
            hidden, tokens, _ = decoder.greedy_pass(entering, layers, cache, n_scored=n_scored)
            assert torch.equal(hidden, expected)
            assert torch.equal(tokens, decoder.logits(expected)[:, -n_scored:].argmax(-1))


def draft_rule(costs=(0.0,) * 6, ends=(), acceptance=(0.9,), lookahead=0, **options):
    return DraftRule(
        **{"rate": 1.0, "mean": 0.8, "head": 0.0, "overhead": 0.0, **options},
        acceptance=acceptance,
        costs=costs,
        lookahead=lookahead,
        ends=ends,
    )


@pytest.mark.parametrize("kind", DECODERS)
def test_a_draft_in_one_call_is_steps_until_a_rule_ends_it(kind, tmp_path, monkeypatch):
    decoder = compiled(saved("llama2", tmp_path), kind)
    by_confidence = np.random.default_rng(0).random(10_000).tolist()
    for head in (None, ReducedHead(decoder, range(7, 90))):
        exit_ = EarlyExit(decoder, 2, Sampler(Sampling(), "cpu"), head, with_confidence=True)

        def drafted(rule, *, in_one_call, exit_=exit_):
            monkeypatch.setattr(EarlyExit, "drafts_in_one_call", in_one_call)
            cache = decoder.new_cache(12)
            cache.lengths += 2
            draft = Draft(torch.tensor([[9]]), cache)
            draft.pending = [torch.tensor([[7, 8]]), draft.last]
            discarded = draft_by(exit_, draft, rule)
            hidden, _ = draft.hidden_states(decoder, 2)
            assert cache.lengths.item() == 2
            return draft, discarded, hidden, cache.slots

        whole, *_ = drafted(draft_rule(), in_one_call=True)
        kept = whole.tokens[0].tolist()
        assert len(kept) == 6
        unsure = {"costs": (0.0, 0.0, 0.15, 0.0), "head": 0.01, "acceptance": (0.5,)}
        for rule, n, is_discarded in (
            (draft_rule(costs=(0.0,)), 1, False),
            (draft_rule(ends=kept[2:3]), kept.index(kept[2]) + 1, False),
            (draft_rule(costs=(0.0, 0.0, 0.0, 0.72, 0.0, 0.0), head=0.1), 3, False),
            (draft_rule(**unsure), 2, True),
            (draft_rule(**unsure, lookahead=1), 4, False),
            (draft_rule(costs=(1.0,) * 3), 0, True),
            (draft_rule(costs=(0.2,) * 6, n_drafted=4), 2, False),
            (draft_rule(costs=(0.3,) * 6, acceptance=by_confidence), None, None),
        ):
            made, left_out, hidden, slots = drafted(rule, in_one_call=True)
            expected, left_out_in_steps, *states = drafted(rule, in_one_call=False)
            assert torch.equal(hidden, states[0])
            assert torch.equal(slots, states[1])
            assert torch.equal(made.tokens, expected.tokens)
            assert made.confidences == pytest.approx(expected.confidences, rel=1e-4)
            assert (left_out is None) == (left_out_in_steps is None)
            if left_out is not None:
                assert torch.equal(left_out.tokens, left_out_in_steps.tokens)
            if n is not None:
                assert made.tokens[0].tolist() == kept[:n]
                assert (left_out is not None) == is_discarded


def test_capped_logits_have_the_same_bits_alone_and_together(tmp_path):
    changes = {"final_logit_softcapping": 3.0, "vocab_size": 1003}
    decoder = compiled(saved("gemma2-uncapped", tmp_path, **changes), "float32")
    hidden = torch.randn(1, 9, 64, generator=torch.manual_seed(0))
    alone = torch.cat([decoder.logits(position) for position in hidden.split(1, dim=1)], dim=1)
    for n in range(1, 10):
        assert torch.equal(decoder.logits(hidden[:, :n]), alone[:, :n]), n


@pytest.mark.parametrize("needed", [97, 101])
def test_longrope_goes_by_the_requested_capacity(needed, tmp_path):
    """Whole tiles of positions reach beyond the original context when the request does not."""
    tiny_models.build("phi4-mini", original_max_position_embeddings=100).save_pretrained(tmp_path)
    tokens, states = tiny_models.token_ids("phi4-mini", 1, 90), []
    for is_compiled in (False, True):
        decoder = load(tmp_path, dtype=torch.float32, compiled=is_compiled).decoder
        cache = decoder.new_cache(needed)
        states.append(decoder.run(decoder.embed(tokens), 0, LAYERS, cache))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


# --- arguments


def test_no_positions(tmp_path):
    decoder = compiled(saved("llama2", tmp_path), "float32")
    hidden = decoder.embed(torch.zeros(1, 0, dtype=torch.long))
    assert decoder.run(hidden, 0, LAYERS, decoder.new_cache(4)).shape == hidden.shape
    assert decoder.logits(hidden).shape == (1, 0, decoder.architecture.vocab_size)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_impossible_layers_and_positions_are_refused(is_compiled, tmp_path):
    decoder = load(saved("llama2", tmp_path), dtype=torch.float32, compiled=is_compiled).decoder
    one = torch.zeros(1, 1, dtype=torch.long)
    for start, stop in ((0, LAYERS + 1), (2, 1), (-1, 1)):
        with pytest.raises(ValueError, match=f"this model has {LAYERS}"):
            decoder.run(decoder.embed(one), start, stop, decoder.new_cache(32))
    with pytest.raises(ValueError, match="holds 32 positions, 33 are needed"):
        decoder.run(decoder.embed(one.expand(1, 33)), 0, LAYERS, decoder.new_cache(32))


def test_tokens_outside_of_the_vocabulary_are_refused(tmp_path):
    decoder = compiled(saved("llama2", tmp_path), "float32")
    for token in (-1, decoder.architecture.vocab_size):
        with pytest.raises(IndexError, match="outside of 0 to"):
            decoder.embed(torch.tensor([[token]]))
        with pytest.raises(IndexError, match="outside of the vocabulary"):
            decoder.greedy_step(torch.tensor([[token]]), LAYERS, decoder.new_cache(8))
        with pytest.raises(IndexError, match="outside of the vocabulary"):
            decoder.greedy_draft(torch.tensor([[token]]), 1, decoder.new_cache(8), draft_rule())


def test_caches_and_states_of_other_decoders_are_refused(tmp_path):
    decoder = compiled(saved("llama2", tmp_path / "llama2"), "float32")
    other = compiled(saved("llama-mqa", tmp_path / "mqa"), "float32")
    tokens = torch.tensor([[5]])

    def changed(**parts):
        cache = decoder.new_cache(8)
        vars(cache).update(parts)
        return cache

    slots = decoder.new_cache(8).slots
    for cache in (
        other.new_cache(8),
        super(NativeDecoder, decoder).new_cache(8),  # not whole tiles
        changed(capacity=64),
        changed(slots=slots.half()),
        changed(slots=slots.transpose(0, 1).contiguous().transpose(0, 1)),
        changed(slots=slots.to("meta")),
        changed(lengths=torch.zeros(1, dtype=torch.int32)),
        changed(lengths=torch.zeros(1, device="meta", dtype=torch.int64)),
    ):
        for call in (
            lambda cache: decoder.run(decoder.embed(tokens), 0, LAYERS, cache),
            lambda cache: decoder.greedy_step(tokens, LAYERS, cache),
            lambda cache: decoder.greedy_draft(tokens, 1, cache, draft_rule()),
        ):
            with pytest.raises(ValueError, match="is not one of this decoder's `new_cache`"):
                call(cache)
    for call in (
        lambda: decoder.run(decoder.embed(tokens.expand(2, 1)), 0, LAYERS, decoder.new_cache(8)),
        lambda: decoder.greedy_step(tokens.expand(2, 1), LAYERS, decoder.new_cache(8)),
    ):
        with pytest.raises(ValueError, match="the KV cache has 1 rows, 2 are given"):
            call()
    for hidden in (torch.zeros(1, 1, 32), torch.zeros(1, 1, 64, device="meta")):
        for use in (
            lambda states: decoder.run(states, 0, LAYERS, decoder.new_cache(8)),
            decoder.logits,
            decoder.greedy_tokens,
        ):
            with pytest.raises(ValueError, match=r"inputs are \[N, 64\] on the CPU"):
                use(hidden)


# --- loading


@pytest.mark.parametrize(("case", "dtype"), [("gpt-neox", "float32"), ("llama2", "float16")])
def test_kernels_that_do_not_support_the_model(case, dtype, tmp_path):
    folder = saved(case, tmp_path)
    assert LayerSkipModel.from_pretrained(folder, dtype=dtype).decoder.kernels == "pytorch"
    with pytest.raises(ValueError, match=f"the compiled kernels have no {dtype} of"):
        LayerSkipModel.from_pretrained(folder, dtype=dtype, compile=True)


def test_compile_can_be_switched_off(tmp_path):
    folder = saved("llama2", tmp_path)
    kinds = [
        isinstance(LayerSkipModel.from_pretrained(folder, compile=value).decoder, NativeDecoder)
        for value in (None, True, False)
    ]
    assert kinds == [True, True, False]


def test_bfloat16_is_the_default_where_it_is_fast(monkeypatch, tmp_path):
    folder = saved("llama2", tmp_path)

    def dtypes():
        models = (LayerSkipModel.from_pretrained(folder, compile=c) for c in (True, False))
        return [str(model.decoder.dtype) for model in models]

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert dtypes() == ["torch.bfloat16"] * 2
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert dtypes() == ["torch.bfloat16", "torch.float32"]


_DEFAULTS = """
import sys, torch
from layerskip import LayerSkipModel

def outputs(model):
    how = {"max_new_tokens": 12, "ignore_eos": True}
    drafting = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 3}
    sampling = {"temperature": 1.0, "seed": 1}
    options = ({}, drafting, {**drafting, "adaptive": True}, sampling, {**drafting, **sampling})
    return [model.generate([5, 6, 7], **how, **more).token_ids for more in options]

def load():
    return LayerSkipModel.from_pretrained(sys.argv[1], dtype="float32", compile=True)

before = load()
expected = outputs(before)
for name in ("float64", "bfloat16"):
    torch.set_default_dtype(getattr(torch, name))
    assert outputs(before) == outputs(load()) == expected, name
"""


def test_memory_for_c_does_not_have_pytorchs_default_dtype(tmp_path):
    """With another default dtype C would write beyond its memory."""
    command = [sys.executable, "-c", _DEFAULTS, str(saved("llama2", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
