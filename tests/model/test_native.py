"""The compiled kernels: right numbers, and the same bits for any number of rows."""

import ctypes
import dataclasses
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from layerskip.decoding.short_head import ReducedHead
from tiny_decoders import ALL_DRAFTS, PLAIN, ids, random_prompt, speculative, steps

import tiny_models
from layerskip import LayerSkipModel, cli
from layerskip.decoding import Sampling
from layerskip.decoding.placement import KernelsWarning
from layerskip.model import Draws, load
from layerskip.model.native import (
    NativeDecoder,
    NoCompilerError,
    PackedMatrix,
    build,
    prepare,
)
from layerskip.model.native import (
    build as threads,
)
from layerskip.model.native import (
    packed as panels,
)
from layerskip.model.quantize import Quantized, quantize
from tiny_models import LAYERS

pytestmark = pytest.mark.usefixtures("compiled_kernels")
KINDS = ("float32", "bfloat16", "int8", "int4")
# A relative error for each: of sums alone, and of inputs rounded to 8 bits of mantissa, or to 8 bits.
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2, "int8": 2e-2, "int4": 2e-2}
MANY = 33


@pytest.fixture(scope="module", params=["native", "cascadelake", "x86-64-v3", "x86-64-v2"])
def build_for(request, tmp_path_factory):
    """The kernels of this CPU (None), and as others have them: AVX-512 without bfloat16, AVX2, SSE."""
    request.getfixturevalue("compiled_kernels")
    if request.param == "native":
        return None
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("of other CPUs")
    flags = re.search(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    needed = {"avx2", "fma", "f16c"}
    if request.param == "cascadelake":
        needed |= {f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl", "_vnni")}
    if flags is None or not needed <= set(flags[0].split()):
        pytest.skip("this CPU cannot run them")
    made = tmp_path_factory.mktemp("kernels") / f"{request.param}.so"
    command = [
        word.replace("-march=native", f"-march={request.param}") for word in build._compiler()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_compiler", lambda: (*command, "-mfma"))
        try:
            build._compile(made)
        except NoCompilerError as error:
            pytest.skip(str(error))
    return build._load(made)


@pytest.fixture
def machine(build_for, monkeypatch):
    """Matrices and decoders are that CPU's, in this test alone."""
    if build_for is not None:
        monkeypatch.setattr(panels, "library", lambda: build_for)
        monkeypatch.setattr("layerskip.model.native.native_decoder.library", lambda: build_for)
        monkeypatch.setattr("layerskip.model.native.native_decoder.library", lambda: build_for)


def matrix_of(kind, n_out, n_in, *, biased=False):
    """A random matrix as the kernels have it, and in float32; and its bias."""
    generator = torch.manual_seed(n_out + n_in)
    values = torch.randn(n_out, n_in, generator=generator)
    bias = torch.randn(n_out, generator=generator) if biased else None
    if kind.startswith("int"):
        weight = quantize(values, int(kind[3:]))
        return PackedMatrix(weight, bias), weight.dequantize(), bias
    weight = values.to(getattr(torch, kind))
    return PackedMatrix(weight, bias), weight.float(), bias


def as_stored(kind, n_out=48, n_in=64):
    """Groups whose grid is not centred in 8 bits, and is in 4 bits, as in GGUF files."""
    weight = quantize(torch.randn(n_out, n_in, generator=torch.manual_seed(1)), 8)
    bits = int(kind[3:])
    offsets = None if bits == 4 else weight.float_offsets().half()
    return Quantized(bits, weight.codes & (2**bits - 1), weight.scales, offsets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 32), (48, 64), (101, 96), (400, 576)])
@pytest.mark.parametrize("biased", [False, True])
def test_product(machine, kind, shape, biased):
    matrix, weight, bias = matrix_of(kind, *shape, biased=biased)
    x = torch.randn(MANY, shape[1], generator=torch.manual_seed(0))
    expected = torch.nn.functional.linear(x, weight, bias)
    error = (matrix(x) - expected).norm() / expected.norm()
    assert error < TOLERANCE[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_have_the_same_bits_alone_and_together(machine, kind, threads):
    before = torch.get_num_threads()
    matrix, _, _ = matrix_of(kind, 400, 576, biased=True)
    x = torch.randn(MANY, 576, generator=torch.manual_seed(0))
    alone = torch.cat([matrix(row) for row in x.split(1)])
    try:
        torch.set_num_threads(threads)
        for n in range(1, MANY + 1):
            assert torch.equal(matrix(x[:n]), alone[:n]), n
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 5])
def test_largest_codes_do_not_overflow(machine, kind, rows):
    bits = int(kind[3:])
    codes = torch.full((16, 64), 2**bits - 1, dtype=torch.uint8)
    codes[1::2] = 0
    matrix = PackedMatrix(Quantized(bits, codes, torch.ones(16, 2).half(), None))
    x = torch.ones(rows, 64)
    x[:, 1::4] = -1
    expected = x @ (codes.float() - 2 ** (bits - 1)).T
    assert (matrix(x) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (matrix(-x) + expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_grids_of_gguf_files(machine, kind):
    weight = as_stored(kind)
    x = torch.randn(5, 64, generator=torch.manual_seed(0))
    matrix = PackedMatrix(weight)
    expected = x @ weight.dequantize().T
    assert (matrix(x) - expected).norm() / expected.norm() < TOLERANCE[kind]
    assert torch.equal(matrix.look_up(torch.arange(48)), weight.dequantize())


def test_scales_of_every_float16(machine):
    """Where the CPU takes subnormal float32 for 0, too."""
    scales = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[:, None]
    codes = torch.ones(2**16, 32, dtype=torch.uint8)
    matrix = PackedMatrix(Quantized(8, codes, scales, torch.zeros_like(scales)))
    expected = scales.float().expand(-1, 32)
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            found = matrix.look_up(torch.arange(2**16))
        finally:
            torch.set_flush_denormal(False)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


# As the bits of float32: NaN of a computation, of memory that is all ones, infinity.
NON_FINITE_MESSAGE = {"nan": 0x7FC00000, "ones": -1, "inf": 0x7F800000}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", NON_FINITE_MESSAGE.values(), ids=NON_FINITE_MESSAGE)
def test_an_input_that_is_no_number_shows_in_all_outputs(machine, kind, bits):
    matrix, _, _ = matrix_of(kind, 48, 64)
    for place in (0, 15, 16, 30, 63):
        x = torch.randn(3, 64, generator=torch.manual_seed(place))
        x.view(torch.int32)[1, place] = bits
        finite = matrix(x).isfinite()
        assert finite[[0, 2]].all()
        assert not finite[1].any()


@pytest.mark.parametrize(
    "part", ["input_layernorm", *(f"self_attn.{x}_proj" for x in "qkv"), "mlp.gate_proj"]
)
@pytest.mark.parametrize(
    ("kind", "number"),
    list(itertools.product(("float32", "bfloat16", "int8", "int4"), ("nan", "inf", "-inf"))),
)
def test_damaged_weights_are_said_to_be(machine, part, kind, number, tmp_path):
    model = tiny_models.build("llama2")
    weight = model.get_parameter(f"model.layers.1.{part}.weight")
    weight.data.view(-1)[5] = float(number)
    model.save_pretrained(tmp_path)
    how = {"weights": kind} if kind.startswith("int") else {"dtype": kind}
    for compile_ in (True, False):
        loaded = LayerSkipModel.from_pretrained(tmp_path, **how, compile=compile_)
        with pytest.raises(ValueError, match="weights are damaged"):
            loaded.generate([5, 6, 7], max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_looked_up_and_cut_out(kind):
    matrix, weight, _ = matrix_of(kind, 101, 96)
    index = torch.tensor([[100, 0, 17], [17, 16, 15]])
    assert torch.equal(matrix.look_up(index), weight[index])
    x = torch.randn(3, 96, generator=torch.manual_seed(0))
    short = matrix.rows(index[0])
    assert torch.equal(short(x), matrix(x)[:, index[0]])
    assert short.weight_bytes < matrix.weight_bytes


def saved(case, folder, **changes):
    """A tiny checkpoint whose early exits agree with its last layer now and then."""
    model = tiny_models.build(case, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")) and ".layers.0." not in name:
            parameter.data *= 0.3
    model.save_pretrained(folder)
    return folder


def compiled(folder, kind):
    how = {"dtype": getattr(torch, kind)} if kind in ("float32", "bfloat16") else {"weights": kind}
    decoder = load(folder, **{"dtype": torch.bfloat16, **how}, compiled=True).decoder
    assert isinstance(decoder, NativeDecoder)
    return decoder


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama3.2", "mistral", "qwen3-sliding"])
def test_passes_have_the_same_bits_in_any_pieces(case, kind, tmp_path):
    decoder = compiled(saved(case, tmp_path), kind)
    tokens = tiny_models.token_ids(case, 2, 70)
    outcomes = []
    for sizes in ([70], [1] * 70, [40, 1, 9, 2, 5, 1, 12]):
        cache, parts = decoder.new_cache(70, 2), []
        for chunk in tokens.split(sizes, dim=1):
            parts.append(decoder.run(decoder.embed(chunk), 0, LAYERS, cache))
            cache.lengths += chunk.shape[1]
        outcomes.append(decoder.logits(torch.cat(parts, dim=1)))
    assert torch.equal(outcomes[0], outcomes[1])
    assert torch.equal(outcomes[0], outcomes[2])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama3.2", "qwen3-sliding"])
def test_long_contexts_have_the_same_bits_however_threads_share_them(case, kind, threads, tmp_path):
    """Few positions behind many are shared by their context, many by their heads."""
    decoder = compiled(saved(case, tmp_path), kind)
    tokens = tiny_models.token_ids(case, 1, 400)
    outcomes, before = [], torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for sizes in ([400], [120, 1, 7, 1, 2, 125, 1, 3, 40, 80, 5, 15]):
            cache, parts = decoder.new_cache(400), []
            for chunk in tokens.split(sizes, dim=1):
                parts.append(decoder.run(decoder.embed(chunk), 0, LAYERS, cache))
                cache.lengths += chunk.shape[1]
            outcomes.append(torch.cat(parts, dim=1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outcomes[0], outcomes[1])


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama3.2", "qwen3-sliding"])
def test_long_contexts_of_several_lengths_together(case, kind, n, tmp_path):
    decoder = compiled(saved(case, tmp_path), kind)
    tokens, lengths = tiny_models.token_ids(case, 3, 400), (390, 130, 260)
    together, alone = decoder.new_cache(400, 3), []
    decoder.run(decoder.embed(tokens), 0, LAYERS, together)
    together.lengths = torch.tensor(lengths)
    for row, length in enumerate(lengths):
        cache = decoder.new_cache(400)
        decoder.run(decoder.embed(tokens[row : row + 1, :length]), 0, LAYERS, cache)
        cache.lengths += length
        alone.append(decoder.run(decoder.embed(tokens[row : row + 1, :n]), 0, LAYERS, cache))
    passed = decoder.run(decoder.embed(tokens[:, :n]), 0, LAYERS, together)
    assert torch.equal(passed, torch.cat(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_seen_may_be_no_number(machine, kind, tmp_path):
    """As of a draft that is rejected."""
    model = tiny_models.build("llama2")
    model.get_input_embeddings().weight.data[90] = float("nan")
    model.save_pretrained(tmp_path)
    decoder = compiled(tmp_path, kind)
    plain, drafted = decoder.new_cache(8), decoder.new_cache(8)

    def run(cache, *tokens):
        hidden = decoder.run(decoder.embed(torch.tensor([tokens])), 0, LAYERS, cache)
        cache.lengths += len(tokens)
        return hidden

    expected = run(plain, 5, 6)
    found = run(drafted, 5, 6, 90, 8)
    assert torch.equal(found[:, :2], expected)
    assert not found[:, 2:].isfinite().any()
    drafted.lengths -= 2
    assert torch.equal(run(drafted, 7), run(plain, 7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["llama3.2", "mistral", "qwen3-sliding"])
def test_self_speculative_equals_plain_in_every_type(case, kind, tmp_path):
    decoder = compiled(saved(case, tmp_path), kind)
    outcomes = set()
    for length in (1, 30):
        prompt = random_prompt(decoder, length)
        plain = ids(decoder, prompt, PLAIN, 40)
        for exit_layer, d in itertools.product((1, 2, LAYERS - 1), (1, 4, 9)):
            made = steps(decoder, prompt, speculative(exit_layer, d), 40)
            assert [token for step in made for token in step.tokens] == plain, (exit_layer, d)
            outcomes |= {(step.drafted, step.accepted) for step in made}
    assert any(0 < accepted < drafted for drafted, accepted in outcomes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_all_drafts_together_equal_plain_in_every_type(kind, penalty, tmp_path):
    decoder = compiled(saved("llama3.2", tmp_path), kind)
    sampling = Sampling(repetition_penalty=penalty)
    plan = dataclasses.replace(ALL_DRAFTS, exit_layer=1, draft_tokens=12)
    sources = set()
    for seed in range(3):
        prompt = random_prompt(decoder, 6, seed) * 3
        made = steps(decoder, prompt, plan, 60, sampling)
        plain = ids(decoder, prompt, PLAIN, 60, sampling)
        assert [token for step in made for token in step.tokens] == plain
        sources |= {step.source for step in made if step.drafted}
    assert sources


@pytest.mark.parametrize("case", ["llama3.2", "qwen3-sliding"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_decoder_is_near_that_of_pytorch(case, kind, tmp_path):
    saved(case, tmp_path)
    native = compiled(tmp_path, kind)
    how = {} if kind in ("float32", "bfloat16") else {"weights": kind}
    other = load(tmp_path, dtype=torch.float32, **how).decoder
    tokens = tiny_models.token_ids(case, 1, 300)
    logits = [
        d.logits(d.run(d.embed(tokens), 0, LAYERS, d.new_cache(300))) for d in (native, other)
    ]
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_weights_share_memory_so_that_it_comes_in_large_pages(kind, tmp_path):
    decoder = compiled(saved("llama3.2", tmp_path), kind)
    held = [
        panels
        for layer in decoder.layers
        for product in (layer.qkv, layer.attention_out, layer.mlp.gate_up, layer.mlp.down)
        for panels in product._held
        if panels is not None
    ]
    assert len(held) >= 2 * len(decoder.layers)
    assert len({panels.untyped_storage().data_ptr() for panels in held}) == 1


def test_short_head(tmp_path):
    decoder = compiled(saved("llama3.2", tmp_path), "int4")
    hidden = torch.randn(1, 3, 64, generator=torch.manual_seed(0))
    head = ReducedHead.of(decoder, (0, 5, 90, 17), [3, 5])
    assert sorted(head.token_ids.tolist()) == [0, 3, 5, 17, 90]
    assert torch.equal(head.short.logits(hidden), decoder.logits(hidden)[..., head.token_ids])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_choice_is_the_highest_logit(cap, kind, tmp_path):
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    hidden = torch.randn(2, 5, decoder.architecture.hidden_size, generator=torch.manual_seed(0))
    logits = decoder.logits(hidden)
    few, more = torch.arange(50, 90), torch.tensor([3, 5])
    short = decoder.with_short_head(few).beside(decoder.with_short_head(more))
    for exit_, scores in ((decoder, logits), (short, logits[..., torch.cat([few, more])])):
        chosen, probabilities = exit_.choose_with_probability(hidden)
        assert torch.equal(chosen, scores.argmax(-1))
        assert torch.equal(exit_.choose(hidden), chosen)
        torch.testing.assert_close(probabilities, scores.softmax(-1).amax(-1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("cap", "vocab_size"), [(None, 96), (None, 1003), (3.0, 96)])
def test_distributions_are_the_softmax_of_the_logits(machine, cap, vocab_size, kind, tmp_path):
    changes = {"final_logit_softcapping": cap, "vocab_size": vocab_size}
    decoder = compiled(saved("gemma2-uncapped", tmp_path, **changes), kind)
    hidden = torch.randn(2, 5, decoder.architecture.hidden_size, generator=torch.manual_seed(0))
    logits = decoder.logits(hidden)
    few, more = torch.arange(20, 90), torch.tensor([3, 5])
    short = decoder.with_short_head(few).beside(decoder.with_short_head(more))
    for exit_, scores in ((decoder, logits), (short, logits[..., torch.cat([few, more])])):
        for temperature in (0.3, 1.0, 2.0):
            found, expected = exit_.distributions(hidden, temperature), (scores / temperature)
            expected = expected.softmax(-1)
            torch.testing.assert_close(found[:, :], expected)
            torch.testing.assert_close(found[1, 2:4], expected[1, 2:4])
            for i in range(5):
                alone = exit_.distributions(hidden[:, i : i + 1], temperature)
                assert torch.equal(found[:, i], alone[:, 0])
                best = expected[:, i].argmax(-1, keepdim=True)
                torch.testing.assert_close(found.of(i, best), expected[:, i].amax(-1, keepdim=True))
                assert found.highest(i) <= expected[:, i].amax() * 1.0001
                assert found.chance(1, i, 4) == pytest.approx(float(expected[1, i, 4]), rel=1e-4)
        one = exit_.distributions(hidden[:1, :1])
        torch.testing.assert_close(one.highest(0), scores[0, 0].softmax(-1).amax())
        best = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        assert torch.equal(exit_.distributions(hidden, 1e-38)[:, :].round(), best)


@pytest.mark.parametrize("sizes", [(1,), (255,), (256,), (257, 3), (700, 300, 5), (3, 1024)])
def test_a_draw_is_where_the_running_sum_passes_its_share(machine, sizes, tmp_path):
    """Whatever the blocks, the parts of the head, and how many threads made them."""
    decoder = compiled(saved("llama3.2", tmp_path, vocab_size=1100), "float32")
    hidden = 4 * torch.randn(2, 3, 64, generator=torch.manual_seed(sum(sizes)))
    ids, exit_ = torch.randperm(1100)[: sum(sizes)].split(sizes), None
    for part in ids:
        more = decoder.with_short_head(part)
        exit_ = more if exit_ is None else exit_.beside(more)
    found = exit_.distributions(hidden, 0.7)
    shares = torch.cat([torch.rand(40, dtype=torch.float64), torch.tensor([0.0, 1 - 2**-53])])
    for row, i in itertools.product(range(2), range(3)):
        own = found[row, i].double()
        sums = own.cumsum(0)
        for share in shares.tolist():
            token = found.pick(row, i, share)
            assert own[token] > 0
            before = float(sums[token - 1]) if token else 0.0
            assert before - 1e-5 <= share * float(sums[-1]) <= float(sums[token]) + 1e-5
            drawn = found.draw(i, torch.full((2, 1), share, dtype=torch.float64))
            assert int(drawn[row]) == token


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_verification_is_a_pass_and_a_choice(cap, kind, tmp_path):
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    cache, tokens = decoder.new_cache(12, 2), torch.tensor([[1, 2, 7, 9], [3, 4, 30, 8]])
    decoder.run(decoder.embed(tokens), 0, LAYERS, cache)
    cache.lengths += torch.tensor([4, 2])
    for start, positions in itertools.product((0, 2, LAYERS), (1, 4)):
        states = decoder.run(decoder.embed(tokens[:, :positions]), 0, start, cache)
        expected = decoder.choose(decoder.run(states, start, LAYERS, cache))
        assert torch.equal(decoder.verify(states, start, cache), expected)
    assert decoder.verify(states[:, :0], 2, cache).shape == (2, 0)
    assert cache.lengths.tolist() == [4, 2]
    with pytest.raises(ValueError, match="layers"):
        decoder.verify(states, -1, cache)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_drawn_steps_and_drafts_are_passes_and_draws(cap, kind, short, tmp_path):
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    head = ReducedHead.of(decoder, (5, 80, 9, 11), [3]) if short else None
    exit_, ids_ = (decoder, torch.arange(96)) if head is None else (head.short, head.token_ids)
    last, found = torch.tensor([[7], [30]]), []
    for whole in (True, False):
        cache, draws = decoder.new_cache(9, 2), Draws(0.7, torch.Generator().manual_seed(1))
        if whole:
            given = (None, None) if head is None else (head.short, head.token_ids)
            states, tokens = decoder.draft(last, 3, 2, cache, *given, None, draws)
            step = decoder.step(tokens[:, -1:], LAYERS, cache, draws)
        else:
            states, tokens = [], [last]
            for _ in range(3):
                states.append(decoder.run(decoder.embed(tokens[-1]), 0, 2, cache))
                cache.lengths += 1
                drawn = draws.next(exit_.distributions(states[-1], 0.7), last)
                tokens.append(ids_[drawn])
            states, tokens = torch.cat(states, 1), torch.cat(tokens, 1)[:, 1:]
            hidden = decoder.run(decoder.embed(tokens[:, -1:]), 0, LAYERS, cache)
            step = draws.next(decoder.distributions(hidden, 0.7), last)
        chosen = torch.cat([which for _, which in draws.drawn])
        chances = torch.cat([p.of(0, which) for p, which in draws.drawn])
        found.append((states, tokens, step, chosen, chances))
    assert all(map(torch.equal, *found))


def test_a_distribution_that_is_no_number_gives_no_token(tmp_path):
    decoder = compiled(saved("llama3.2", tmp_path), "float32")
    hidden = torch.randn(2, 3, 64, generator=torch.manual_seed(0))
    hidden[1, 1, 7] = float("nan")
    found = decoder.distributions(hidden)
    assert found[1, 1].isnan().all()
    assert not found[0].isnan().any()
    with pytest.raises(ValueError, match="results are not finite"):
        found.pick(1, 1, 0.5)
    share = torch.full((2, 1), 0.5, dtype=torch.float64)
    assert found.draw(0, share).shape == (2, 1)


@pytest.mark.parametrize("vocab_size", [96, 101, 1003])
def test_capped_logits_have_the_same_bits_alone_and_together(vocab_size, tmp_path):
    changes = {"final_logit_softcapping": 3.0, "vocab_size": vocab_size}
    decoder = compiled(saved("gemma2-uncapped", tmp_path, **changes), "float32")
    hidden = torch.randn(1, 9, 64, generator=torch.manual_seed(0))
    alone = torch.cat([decoder.logits(position) for position in hidden.split(1, dim=1)], dim=1)
    for n in range(1, 10):
        assert torch.equal(decoder.logits(hidden[:, :n]), alone[:, :n]), n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_draft_is_passes_and_choices(cap, kind, tmp_path):
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    cache, tokens = decoder.new_cache(9, 2), torch.tensor([[7], [30]])
    decoder.run(decoder.embed(torch.tensor([[1, 2], [3, 4]])), 0, LAYERS, cache)
    cache.lengths += 2
    head = ReducedHead.of(decoder, (5, 80, 9), [3])
    every = torch.arange(decoder.architecture.vocab_size)
    short = partial(decoder.draft, short=head.short, token_ids=head.token_ids)
    drafts = (decoder.draft, every), (short, head.token_ids)
    for draft, ids_ in (*drafts, drafts[0]):
        states, drafted = draft(tokens, 3, 2, cache)
        assert cache.lengths.tolist() == [5, 5]
        cache.lengths -= 3
        newest = tokens
        for i in range(3):
            state = decoder.run(decoder.embed(newest), 0, 2, cache)
            cache.lengths += 1
            newest = ids_[decoder.logits(state)[..., ids_].argmax(-1)]
            assert torch.equal(states[:, i : i + 1], state)
            assert torch.equal(drafted[:, i : i + 1], newest)
        cache.lengths -= 3


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cap", [None, 3.0])
def test_a_draft_begins_after_several_tokens(cap, kind, rows, tmp_path):
    """They go through the layers as ever, and the exit is asked behind the last of them alone."""
    decoder = compiled(saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap), kind)
    unseen, found = torch.tensor([[7, 8, 9], [30, 31, 32]])[:rows], []
    for ahead in (0, 2):
        for generator in (None, torch.Generator().manual_seed(1)):
            cache, told = decoder.new_cache(9, rows), list[tuple[int, float]]()
            draws = None if generator is None else Draws(0.7, generator)
            before = decoder.run(decoder.embed(unseen[:, :ahead]), 0, 2, cache)
            cache.lengths += ahead

            def goes_on(token, probability, told=told):
                told.append((token, probability))
                return len(told) < 3

            states, tokens = decoder.draft(
                *(unseen[:, ahead:], 4 if rows == 1 else 3, 2, cache),
                draws=draws,
                goes_on=goes_on if rows == 1 else None,
            )
            assert cache.lengths.tolist() == [5] * rows
            assert tokens.shape == (rows, 3)
            found.append((torch.cat([before, states], dim=1), tokens, told))
    for one, other in zip(found[:2], found[2:], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        assert one[2] == other[2]
    assert decoder.draft(unseen, 0, 2, cache)[1].shape == (rows, 0)


@pytest.mark.parametrize("compiled_or_not", [True, False])
def test_a_draft_goes_on_as_long_as_it_is_told_to(compiled_or_not, tmp_path):
    decoder = load(saved("llama2", tmp_path), dtype=torch.float32, compiled=compiled_or_not).decoder
    cache, told = decoder.new_cache(32), list[tuple[int, float]]()

    def goes_on(token, probability):
        told.append((token, probability))
        return len(told) < 3

    last = torch.tensor([[7]])
    states, tokens = decoder.draft(last, 9, 2, cache, goes_on=goes_on)
    assert tokens.tolist() == [[token for token, _ in told]]
    assert states.shape == (1, 3, decoder.architecture.hidden_size)
    assert cache.lengths.tolist() == [3]
    torch.testing.assert_close(
        torch.tensor([probability for _, probability in told]),
        decoder.logits(states)[0].float().softmax(-1).amax(-1),
    )
    nothing = decoder.draft(last, 0, 2, cache)
    assert [part.shape[1] for part in nothing] == [0, 0]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_of_equal_logits_is_chosen_in_any_part(threads):
    """Over more outputs than are looked at together, and parts that are not whole panels."""
    weight = torch.zeros(5003, 32)
    weight[:, 0] = torch.arange(5003) % 41 * 0.25
    weight[4100, 1] = 1000.0
    parts = [PackedMatrix(weight[:2030].contiguous()), PackedMatrix(weight[2030:].contiguous())]
    x = torch.zeros(3, 32)
    x[:, 0], x[1, 1], x[2, 0] = 1.0, 1.0, -1.0
    chosen, probabilities = panels.choose(
        panels.pointers_to(parts), x, None, 0.0, threads=threads, confident=True
    )
    assert chosen.tolist() == [40, 4100, 0]
    torch.testing.assert_close(probabilities, (x @ weight.T).softmax(-1).amax(-1))


def test_no_positions_have_no_logits(tmp_path):
    decoder = compiled(saved("llama2", tmp_path), "bfloat16")
    vocab_size = decoder.architecture.vocab_size
    assert decoder.logits(torch.zeros(1, 0, 64)).shape == (1, 0, vocab_size)


def test_full_cache_is_refused(tmp_path):
    decoder = compiled(saved("llama2", tmp_path), "float32")
    cache = decoder.new_cache(32)
    with pytest.raises(ValueError, match="holds 32 positions, 33 are needed"):
        decoder.run(decoder.embed(torch.zeros(1, 33, dtype=torch.long)), 0, LAYERS, cache)


@pytest.mark.parametrize("needed", [97, 101])
def test_longrope_goes_by_the_capacity_asked_for(needed, tmp_path):
    """Whole tiles of positions reach beyond the original context where the answer does not."""
    tiny_models.build("phi4-mini", original_max_position_embeddings=100).save_pretrained(tmp_path)
    states = []
    for compiled in (False, True):
        decoder = load(tmp_path, dtype=torch.float32, compiled=compiled).decoder
        cache = decoder.new_cache(needed)
        states.append(
            decoder.run(decoder.embed(torch.tensor([random_prompt(decoder, 90)])), 0, LAYERS, cache)
        )
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compiled_or_not", [True, False])
def test_layers_that_are_not_there_are_refused(compiled_or_not, tmp_path):
    decoder = load(saved("llama2", tmp_path), dtype=torch.float32, compiled=compiled_or_not).decoder
    tokens = torch.zeros(1, 1, dtype=torch.long)
    for start, stop in ((0, LAYERS + 1), (2, 1), (-1, 1)):
        with pytest.raises(ValueError, match=f"this model has {LAYERS}"):
            decoder.run(decoder.embed(tokens), start, stop, decoder.new_cache(32))
    with pytest.raises(ValueError, match=f"this model has {LAYERS}"):
        decoder.draft(tokens, 1, LAYERS + 1, decoder.new_cache(32))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """As on a machine that has compiled nothing yet; tells which commands were run."""
    target, real = tmp_path / "kernels" / "made.so", build.target()
    prepare()
    monkeypatch.setattr(build, "target", lambda: target)
    commands = []

    def run(command, **options):
        commands.append(command)
        if "refused" in command[0]:
            return subprocess.CompletedProcess(command, 1, "", "kernels.cpp:1: no such flag\nmore")
        if "killed" in command[0]:
            said = "g++: fatal error: Killed signal terminated program cc1plus"
            return subprocess.CompletedProcess(command, 1, "", said)
        shutil.copyfile(real, command[-1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(build.subprocess, "run", run)
    return commands


def test_compiled_once_and_announced_once(empty_cache):
    said = []
    prepare(said.append)
    prepare(said.append)
    assert said == ["compiling kernels for this machine (once)"]
    assert len(empty_cache) == 1


@pytest.mark.skipif(os.name != "posix", reason="is about the modes of POSIX")
def test_compiled_once_whatever_the_umask_is(empty_cache, tmp_path):
    before = os.umask(0o002)  # as users of Ubuntu and Fedora have it
    try:
        prepare()
        prepare()
    finally:
        os.umask(before)
    assert len(empty_cache) == 1
    assert not (tmp_path / "kernels" / "made.so").stat().st_mode & 0o022


@pytest.mark.skipif(os.name != "posix", reason="is about the modes of POSIX")
def test_modes_that_cannot_be_set_are_said(empty_cache, monkeypatch):
    before = os.umask(0o002)
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    try:
        with pytest.raises(NoCompilerError, match="the kernels cannot be written"):
            prepare()
    finally:
        os.umask(before)


def test_kernels_that_cannot_be_loaded_are_compiled_again(empty_cache, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "made.so").write_bytes(b"cut off")
    said = []
    prepare(said.append)
    assert said == ["compiling kernels again, as those there cannot be loaded"]


def test_kernels_that_never_can_be_loaded_are_as_none(empty_cache, monkeypatch):
    monkeypatch.setattr(
        shutil, "copyfile", lambda _, to: Path(to).write_bytes(b"for another machine")
    )
    said = []
    with pytest.raises(NoCompilerError, match="cannot be loaded"):
        prepare(said.append)
    assert said == ["compiling kernels for this machine (once)"]


@pytest.mark.parametrize(("case", "dtype"), [("gpt-neox", "float32"), ("llama2", "float16")])
def test_what_the_kernels_do_not_know_is_refused_where_they_are_asked_for(case, dtype, tmp_path):
    folder = saved(case, tmp_path)
    assert LayerSkipModel.from_pretrained(folder, dtype=dtype).decoder.kernels == "pytorch"
    with pytest.raises(ValueError, match=f"the compiled kernels have no {dtype} of"):
        LayerSkipModel.from_pretrained(folder, dtype=dtype, compile=True)


def test_too_little_memory_is_an_error():
    matrix, x = PackedMatrix(torch.ones(16, 32)), torch.ones(1, 32)
    with pytest.raises(MemoryError, match="no memory for so many positions"):
        build.library().layerskip_product(
            *(ctypes.byref(matrix.struct), None, 0.0, x.data_ptr(), 1 << 45, x.data_ptr(), 1)
        )


def test_a_compiler_that_refuses_is_not_asked_again(empty_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_compiler", lambda: ("/refused/g++",))
    said = []
    with pytest.raises(NoCompilerError, match=r"refuses: kernels\.cpp:1: no such flag$"):
        prepare(said.append)
    (left,) = (tmp_path / "kernels").iterdir()
    with pytest.raises(NoCompilerError, match=rf"no such flag \(remove {re.escape(str(left))} to"):
        prepare(said.append)
    assert said == ["compiling kernels for this machine (once)"]
    monkeypatch.setattr(build, "_compiler", lambda: ("g++",))
    left.unlink()
    prepare()


def test_a_compiler_that_was_stopped_is_asked_again(empty_cache, monkeypatch, tmp_path):
    """Without memory or room on the disk, which may be there the next time."""
    monkeypatch.setattr(build, "_compiler", lambda: ("/killed/g++",))
    with pytest.raises(NoCompilerError, match="terminated program"):
        prepare()
    assert not any((tmp_path / "kernels").iterdir())
    monkeypatch.setattr(build, "_compiler", lambda: ("g++",))
    prepare()


def test_apples_compiler_takes_pytorchs_openmp(monkeypatch, tmp_path):
    find = build._compiler.__wrapped__
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(shutil, "which", {"clang++": "/usr/bin/clang++"}.get)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(NoCompilerError, match=r"no omp\.h in PyTorch; name another compiler"):
        find()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "omp.h").touch()
    program, *arguments = find()
    assert program == "/usr/bin/clang++"
    assert str(tmp_path / "include") in arguments
    assert "-lomp" not in arguments  # a second OpenMP in a process ends it
    monkeypatch.setenv("CXX", "clang++")  # as many shells have it
    assert find() == (program, *arguments)
    monkeypatch.setenv("CXX", "g++-15")
    assert find()[:2] == ("g++-15", "-fopenmp")


def test_without_a_compiler_pytorch_runs_and_one_line_says_so(monkeypatch, tmp_path, capsys):
    def missing():
        raise NoCompilerError("there is no C++ compiler (g++ or clang++)")

    monkeypatch.setattr(build, "target", missing)
    folder = saved("llama2", tmp_path)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler .*; install one, or load without"):
        LayerSkipModel.from_pretrained(folder, compile=True)
    with pytest.warns(KernelsWarning, match=r"going on without .*, more slowly: there is no C\+\+"):
        model = LayerSkipModel.from_pretrained(folder)
    assert not isinstance(model.decoder, NativeDecoder)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.run(["generate", "--model", str(folder), "--prompt", "x"]) == 1  # no tokenizer
    err = capsys.readouterr().err
    assert "\nlayerskip: going on without compiled kernels, more slowly: there is no C++" in err


def test_no_compiler_has_fast_math_on(monkeypatch, tmp_path):
    """The order of sums would be the compiler's: CXX is overruled, and what is left is refused."""
    command = [*build._compiler(), "-ffast-math", *build._FLAGS, str(build._SOURCE)]
    subprocess.run([*command, "-E", "-o", os.devnull], check=True)
    assert build._FLAGS.index("-fno-fast-math") < build._FLAGS.index("-ffp-contract=off")
    monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-ffast-math"))
    with pytest.raises(NoCompilerError, match=r"refuses: .*error: .*fast-math is on"):
        build._compile(tmp_path / "kernels.so")


def test_warnings_are_not_why_a_compiler_refuses(monkeypatch, tmp_path):
    def run(command, **options):
        return subprocess.CompletedProcess(command, 1, "", "a warning\nkernels.cpp:1: error: no")

    monkeypatch.setattr(build.subprocess, "run", run)
    with pytest.raises(NoCompilerError, match=r"refuses: kernels\.cpp:1: error: no"):
        build._compile(tmp_path / "kernels.so")


def test_a_name_of_a_compiler_that_cannot_be_read(monkeypatch):
    find = build._compiler.__wrapped__
    monkeypatch.setenv("CXX", "g++ '-O2")
    with pytest.raises(NoCompilerError, match="CXX is no command: No closing quotation"):
        find()
    monkeypatch.delenv("CXX")
    unnamed = find()
    monkeypatch.setenv("CXX", " ")
    assert find() == unnamed


def test_a_compiler_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "'not there/g++' -v")
    monkeypatch.setattr(build, "_compiler", build._compiler.__wrapped__)
    assert build._compiler() == ("not there/g++", "-v", "-fopenmp", build._NATIVE)
    with pytest.raises(NoCompilerError, match=r"^not there/g\+\+ cannot be run: No such file"):
        build._compile(tmp_path / "kernels.so")


def test_compile_can_be_switched_off(tmp_path):
    folder = saved("llama2", tmp_path)
    kinds = [
        isinstance(LayerSkipModel.from_pretrained(folder, compile=wanted).decoder, NativeDecoder)
        for wanted in (None, True, False)
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


def test_no_positions_are_nothing_to_do(tmp_path):
    decoder = compiled(saved("llama2", tmp_path), "float32")
    hidden = decoder.embed(torch.zeros(1, 0, dtype=torch.long))
    assert decoder.run(hidden, 0, LAYERS, decoder.new_cache(4)).shape == hidden.shape


_FORK = """
import os, pathlib, sys, torch
from layerskip.model import load

torch.set_num_threads(2)
decoder = load(pathlib.Path(sys.argv[1]), dtype=torch.float32, compiled=True).decoder
def run():
    cache = decoder.new_cache(8)
    return decoder.run(decoder.embed(torch.tensor([[5, 6]])), 0, len(decoder.layers), cache)
expected = run()
child = os.fork()
if child == 0:
    same = torch.equal(run(), expected)
    torch.set_num_threads(2)  # which the child's kernels do not heed
    os._exit(0 if same and torch.equal(run(), expected) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_threads(tmp_path):
    command = [sys.executable, "-c", _FORK, str(saved("llama2", tmp_path))]
    assert subprocess.run(command, timeout=1800, check=False).returncode == 0


@pytest.mark.parametrize(
    ("files", "panels", "expected"),
    [
        ({}, None, 8),
        ({}, 3, 3),
        ({}, 0, 1),
        ({"cpu.max": "max 100000"}, None, 8),
        ({"cpu.max": "250000 100000"}, None, 3),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, None, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 8),
        # Of a service, whose group lies deeper, and the least of all above it counts.
        ({"own": "0::/a/b.service", "a/b.service/cpu.max": "200000 100000"}, None, 2),
        ({"own": "0::/a/b.service", "a/cpu.max": "300000 100000"}, None, 3),
        (
            {
                "own": "0::/a/b.service",
                "a/cpu.max": "300000 100000",
                "a/b.service/cpu.max": "max 100000",
            },
            None,
            3,
        ),
        (
            {
                "own": "7:memory:/m\n4:cpu,cpuacct:/a",
                "cpu/a/cpu.cfs_quota_us": "200000",
                "cpu/a/cpu.cfs_period_us": "100000",
            },
            None,
            2,
        ),
    ],
)
def test_threads_are_no_more_than_there_are_processors_for(
    files, panels, expected, tmp_path, monkeypatch
):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(threads, "processors", lambda: 8)
    monkeypatch.setattr(threads, "_quota", threads._quota.__wrapped__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert threads.num_threads_to_use(panels) == expected


_THREADS = """
import os, torch
from layerskip.model.native import threads, usable
from layerskip.model.native.build import library

threads._quota = lambda: 99  # whatever a container leaves
library()
torch.set_num_threads(2)
bound = usable()
left = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, left)
print(bound, usable())
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or (os.cpu_count() or 1) < 2, reason="of two processors"
)
@pytest.mark.parametrize("bind", ["", "true"])
def test_threads_are_no_more_than_the_processors_that_are_left(bind):
    """Where OpenMP binds threads to processors, the first one sees but its own."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one processor")
    environment = {**os.environ, "OMP_PROC_BIND": bind or "false", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", _THREADS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=True,
    )
    bound, left = done.stdout.split()
    assert bound == "2"
    assert bind or left == "1"


_DEFAULTS = """
import pathlib, sys, torch
from layerskip import LayerSkipModel

def answer(model):
    how = {"max_new_tokens": 12, "ignore_eos": True}
    drafted = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 3}
    drawn = {"temperature": 1.0, "seed": 1}
    options = ({}, drafted, {**drafted, "adaptive": True}, drawn, {**drafted, **drawn})
    return [model.generate([5, 6, 7], **how, **more).token_ids for more in options]

def load():
    return LayerSkipModel.from_pretrained(sys.argv[1], dtype="float32", compile=True)

before = load()
expected = answer(before)
for name in ("float64", "bfloat16"):
    torch.set_default_dtype(getattr(torch, name))
    assert answer(before) == answer(load()) == expected, name
"""


def test_what_c_writes_into_is_not_what_pytorch_makes_by_default(tmp_path):
    """Another default dtype would have C write beyond its memory."""
    command = [sys.executable, "-c", _DEFAULTS, str(saved("llama2", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr


def test_what_would_be_read_or_written_elsewhere_is_refused(tmp_path):
    decoder = compiled(saved("llama2", tmp_path), "float32")
    for token in (-1, decoder.architecture.vocab_size):
        with pytest.raises(IndexError, match="outside of 0 to"):
            decoder.embed(torch.tensor([[token]]))
    narrow = decoder.embed(torch.tensor([[5, 6]], dtype=torch.int32))
    assert torch.equal(narrow, decoder.embed(torch.tensor([[5, 6]])))
    two, cache = torch.tensor([[5], [6]]), decoder.new_cache(8)
    for call in (
        lambda: decoder.run(decoder.embed(two), 0, LAYERS, cache),
        lambda: decoder.step(two, LAYERS, cache),
        lambda: decoder.draft(two, 2, 2, cache),
    ):
        with pytest.raises(ValueError, match="the KV cache has 1 rows, 2 are given"):
            call()


@pytest.mark.parametrize("cap", [None, 3.0])
def test_token_ids_of_any_whole_numbers(cap, tmp_path):
    folder = saved("gemma2-uncapped", tmp_path, final_logit_softcapping=cap)
    decoder = compiled(folder, "float32")
    last, cache = torch.tensor([[7], [9]]), decoder.new_cache(8, 2)
    few = torch.tensor([3, 50, 8])
    short = decoder.with_short_head(few)
    expected = decoder.step(last, LAYERS, cache)
    drafted = decoder.draft(last, 2, 2, cache, short, few)[1]
    cache.lengths -= 2
    narrow = last.int()
    assert torch.equal(decoder.step(narrow, LAYERS, cache), expected)
    apart = torch.stack([few, few], dim=1).int()[:, 0]
    assert torch.equal(decoder.draft(narrow, 2, 2, cache, short, apart)[1], drafted)


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
        super(NativeDecoder, decoder).new_cache(8),  # no whole tiles
        changed(capacity=64),
        changed(slots=slots.half()),
        changed(slots=slots.transpose(0, 1).contiguous().transpose(0, 1)),
        changed(slots=slots.to("meta")),
        changed(lengths=torch.zeros(1, dtype=torch.int32)),
        changed(lengths=torch.zeros(1, device="meta", dtype=torch.int64)),
    ):
        for call in (
            lambda cache: decoder.run(decoder.embed(tokens), 0, LAYERS, cache),
            lambda cache: decoder.step(tokens, LAYERS, cache),
            lambda cache: decoder.draft(tokens, 2, 2, cache),
        ):
            with pytest.raises(ValueError, match="is not one of this decoder's `new_cache`"):
                call(cache)
    for hidden in (torch.zeros(1, 1, 32), torch.zeros(1, 1, 64, device="meta")):
        for use in (
            lambda states: decoder.run(states, 0, LAYERS, decoder.new_cache(8)),
            decoder.logits,
            decoder.choose,
        ):
            with pytest.raises(ValueError, match=r"inputs are \[N, 64\] on the CPU"):
                use(hidden)
    few = torch.tensor([3, 50, 8])
    short = decoder.with_short_head(few)
    with pytest.raises(ValueError, match="2 token ids are not one for each logit"):
        decoder.draft(tokens, 2, 2, decoder.new_cache(8), short, few[:2])


@pytest.mark.skipif(os.name != "posix", reason="of users and groups")
def test_libraries_that_others_may_write_to_are_compiled_again(empty_cache, tmp_path):
    folder = tmp_path / "kernels"
    prepare()
    for path in (folder, folder / "made.so"):
        path.chmod(0o777)
        prepare()
        assert not any(path.stat().st_mode & 0o022 for path in folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o755
    assert len(empty_cache) == 3


@pytest.mark.skipif(os.name != "posix", reason="of users and groups")
def test_what_took_the_place_of_the_compiled_library_is_not_loaded(empty_cache, monkeypatch):
    compile_it = build._compile

    def exchanged(target):
        compile_it(target)
        monkeypatch.setattr(build, "_is_trusted", lambda found: False)

    monkeypatch.setattr(build, "_compile", exchanged)
    with pytest.raises(NoCompilerError, match="is of another user: set LAYERSKIP_CACHE"):
        prepare()


@pytest.mark.skipif(os.name != "posix", reason="of users and groups")
def test_libraries_of_other_users_are_not_loaded(empty_cache, tmp_path, monkeypatch):
    prepare()
    folder, own = tmp_path / "kernels", tmp_path / "own"
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(build.platformdirs, "user_cache_dir", lambda name: str(own))
    assert build._folder() == folder
    for others in (tmp_path.stat(), folder.stat()):
        monkeypatch.setattr(build, "_is_trusted", lambda found, others=others: found != others)
        assert build._folder() == own / "kernels"
    monkeypatch.setattr(build, "_is_trusted", lambda stat: False)
    own.mkdir()
    assert build._folder() == folder
    with pytest.raises(NoCompilerError, match="is of another user: set LAYERSKIP_CACHE"):
        prepare()
