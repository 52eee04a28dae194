"""Greedy tokens through `torch.compile` equal those of the eager decoder.

CUDA graphs need a GPU: here the compiled passes are traced and run by the backend "aot_eager".
"""

import gc
import threading

import pytest
import torch

from layerskip import LayerSkipModel
from layerskip.decoding.placement import prepared
from layerskip.model import Checkpoint, CheckpointSettings, families, load, loader, torch_compile
from layerskip.model.torch_compile import CompiledDecoder
from tiny_models import build, reference, token_ids

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


@pytest.fixture
def eager(tmp_path):
    build("llama3.1").save_pretrained(tmp_path)
    return load(tmp_path, dtype=torch.float32).decoder


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


@pytest.mark.parametrize("case", ["llama3.1", pytest.param("phi4-mini", marks=pytest.mark.long)])
def test_greedy_tokens_equal_those_of_the_eager_decoder(case, passes, tmp_path):
    build(case).save_pretrained(tmp_path)
    decoder = load(tmp_path, dtype=torch.float32).decoder
    prompt = token_ids(case, 240).tolist()  # the output crosses a power of two

    def generate(decoder, **options):
        settings = CheckpointSettings()
        model = LayerSkipModel(
            Checkpoint(path=None, decoder=decoder, tokenizer=None, settings=settings)
        )
        return model.generate(prompt, max_new_tokens=40, ignore_eos=True, **options).token_ids

    compiled, plain = compiled_from(decoder), generate(decoder, mode="plain")
    assert generate(compiled, mode="plain") == plain
    drafting = {"mode": "self-speculative", "exit_layer": 2, "draft_tokens": 4}
    assert generate(compiled, **drafting) == plain
    assert len(passes) > 60


def test_one_cache_at_a_time_uses_the_reserved_memory(passes, eager):
    compiled = compiled_from(eager)
    first, second = (
        compiled.new_cache(40),
        compiled.with_reduced_head(torch.arange(9)).new_cache(40),
    )
    assert first.slots is compiled._slots
    assert second.slots.data_ptr() != first.slots.data_ptr()
    first.slots.fill_(float("nan"))
    del first
    gc.collect()
    third = compiled.new_cache(40)
    assert third.slots is compiled._slots
    assert not third.slots.any()


def test_batches_long_prompts_and_other_threads_run_eagerly(passes, eager):
    compiled = compiled_from(eager)

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


def test_a_cache_has_the_room_that_was_asked_for(passes, eager):
    compiled = compiled_from(eager)
    cache = compiled.new_cache(8)
    cache.lengths += 7
    hidden = compiled.embed(torch.tensor([[3, 4]]))
    with pytest.raises(ValueError, match="holds 8 positions, 9 are needed"):
        compiled.run(hidden, 0, 2, cache)
    with pytest.raises(ValueError, match="cannot be run"):
        compiled.run(hidden[:, :1], 0, 9, cache)


def test_addresses_of_weights_and_cache_are_static(passes, eager):
    compiled = compiled_from(eager)
    layer = compiled.layers[0]
    for tensor in (compiled._layer_slots[0], layer.qkv.weight, layer.mlp.gate_up.weight):
        assert tensor._dynamo_static_input_type == "unguarded"


def test_it_is_off_by_default_on_cuda_and_refused_for_experts():
    dense, experts = (
        families.from_config(reference(case).config.to_dict()) for case in ("llama3.1", "mixtral")
    )
    chosen = {wanted: prepared(wanted, None, CUDA, print, dense) for wanted in (None, False, True)}
    assert chosen == {None: False, False: False, True: True}
    assert not prepared(None, None, CUDA, print, experts)
    with pytest.raises(ValueError, match="load without compile"):
        prepared(True, None, CUDA, print, experts)
    assert not torch_compile.supports(dense, torch.device("cpu"))


@pytest.mark.parametrize(("compiled", "kernels"), [(True, "torch.compile"), (False, "pytorch")])
def test_loading_on_cuda_selects_it(compiled, kernels, passes, monkeypatch, tmp_path):
    build("llama3.1").save_pretrained(tmp_path)
    monkeypatch.setattr(loader.native, "supports", lambda *where: False)
    monkeypatch.setattr(loader.torch_compile, "supports", lambda *where: True)
    decoder = load(tmp_path, dtype=torch.float32, compiled=compiled).decoder
    assert decoder.kernels == kernels
