"""Greedy tokens through `torch.compile` equal those of the eager decoder.

CUDA graphs need a GPU: here the compiled passes are traced and run by the backend "aot_eager".
"""

import gc
import threading

import pytest
import torch
from tiny_decoders import ALL_DRAFTS, PLAIN, ids, random_prompt, tiny_decoder

from layerskip.decoding import Prefix
from layerskip.decoding.placement import prepared
from layerskip.model import load, torch_compile
from layerskip.model import loader as assembly
from layerskip.model.torch_compile import CompiledDecoder
from tiny_models import build

CUDA = torch.device("cuda")

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # PyTorch's own


@pytest.fixture(scope="module", autouse=True)
def _forget_compilations():
    """Forget compilations after the last test; tests of the same shapes share them."""
    yield
    torch._dynamo.reset()


@pytest.fixture
def passes(monkeypatch):
    """The arguments of all compiled passes."""
    passes, compile_ = [], torch.compile

    def traced(function, *, mode):
        assert mode == "reduce-overhead"
        compiled = compile_(function, backend="aot_eager", fullgraph=True)

        def run(*arguments):
            passes.append(arguments)
            return compiled(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", traced)
    return passes


def compiled_from(decoder):
    return CompiledDecoder(
        decoder.architecture,
        embedding=decoder.embedding,
        layers=decoder.layers,
        final_norm=decoder.final_norm,
        head=None if decoder.tied else decoder.head,
        dtype=decoder.dtype,
        device=decoder.device,
        weights=decoder.weights,
    )


@pytest.mark.parametrize("case", ["llama3.1", "phi4-mini"])
def test_greedy_tokens_equal_those_of_the_eager_decoder(case, passes):
    decoder = tiny_decoder(case)
    compiled = compiled_from(decoder)
    prompt = random_prompt(decoder, 240)  # the answer crosses a power of two
    plain = ids(decoder, prompt, PLAIN, n=40)
    for plan in (PLAIN, ALL_DRAFTS):
        assert ids(compiled, prompt, plan, n=40) == plain, plan
    assert len(passes) > 60


def test_turns_of_a_conversation_share_the_reserved_cache(passes):
    decoder = tiny_decoder("llama3.1")
    compiled, prefix, prompt = compiled_from(decoder), Prefix(), random_prompt(decoder, 30)
    for _ in range(2):
        expected = ids(decoder, prompt, PLAIN)
        assert ids(compiled, prompt, PLAIN, prefix=prefix) == expected
        prompt = [*prompt, *expected, 5]
    assert passes


def test_one_cache_at_a_time_uses_the_reserved_memory(passes):
    compiled = compiled_from(tiny_decoder("llama3.1"))
    first, second = compiled.new_cache(40), compiled.with_short_head(torch.arange(9)).new_cache(40)
    assert first.slots is compiled._slots
    assert second.slots.data_ptr() != first.slots.data_ptr()
    first.slots.fill_(float("nan"))
    del first
    gc.collect()
    third = compiled.new_cache(40)
    assert third.slots is compiled._slots
    assert not third.slots.any()


def test_batches_long_prompts_and_other_threads_run_eagerly(passes):
    compiled = compiled_from(tiny_decoder("llama3.1"))

    def run(rows, n, cache):
        compiled.run(compiled.embed(torch.zeros(rows, n, dtype=torch.int64)), 0, 4, cache)

    run(2, 1, compiled.new_cache(40, 2))
    run(1, torch_compile.MAX_POSITIONS + 1, compiled.new_cache(40))
    cache = compiled.new_cache(40)
    thread = threading.Thread(target=run, args=(1, 1, cache))
    thread.start()
    thread.join()
    assert not passes
    run(1, 1, cache)
    assert len(passes) == 1


def test_a_cache_has_the_room_that_was_asked_for(passes):
    compiled = compiled_from(tiny_decoder("llama3.1"))
    cache = compiled.new_cache(8)
    cache.lengths += 7
    hidden = compiled.embed(torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="holds 8 positions, 9 are needed"):
        compiled.run(hidden, 0, 2, cache)
    with pytest.raises(ValueError, match="cannot be run"):
        compiled.run(hidden[:, :1], 0, 9, cache)


def test_addresses_of_weights_and_cache_are_static(passes):
    compiled = compiled_from(tiny_decoder("llama3.1"))
    layer = compiled.layers[0]
    for tensor in (compiled._layer_slots[0], layer.qkv.weight, layer.mlp.gate_up.weight):
        assert tensor._dynamo_static_input_type == "unguarded"


def test_it_is_off_by_default_on_cuda_and_refused_for_experts():
    dense, experts = (tiny_decoder(case).architecture for case in ("llama3.1", "mixtral"))
    chosen = {wanted: prepared(wanted, None, CUDA, print, dense) for wanted in (None, False, True)}
    assert chosen == {None: False, False: False, True: True}
    assert not prepared(None, None, CUDA, print, experts)
    with pytest.raises(ValueError, match="load without compile"):
        prepared(True, None, CUDA, print, experts)
    assert not torch_compile.supports(dense, torch.device("cpu"))


@pytest.mark.parametrize(("compiled", "kernels"), [(True, "torch.compile"), (False, "pytorch")])
def test_loading_on_cuda_selects_it(compiled, kernels, passes, monkeypatch, tmp_path):
    build("llama3.1").save_pretrained(tmp_path)
    monkeypatch.setattr(assembly.native, "supports", lambda *where: False)
    monkeypatch.setattr(assembly.torch_compile, "supports", lambda *where: True)
    decoder = load(tmp_path, dtype=torch.float32, compiled=compiled).decoder
    assert decoder.kernels == kernels
