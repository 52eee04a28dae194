"""A KV cache in int8: the quantization, and decoders that read it."""

import pytest
import torch

import tiny_models
from layerskip import LayerSkipModel
from layerskip.model import load, loader, torch_compile
from layerskip.model.kv_cache import dequantize_states, quantize_states

HEAD_DIM = 64


@pytest.mark.parametrize("head_dim", [64, 10])
def test_rounding_is_by_half_a_step_of_the_largest_at_most(head_dim):
    states = torch.randn(7, 3, head_dim, generator=torch.manual_seed(0))
    states *= torch.logspace(-6, 6, 7)[:, None, None]
    error = dequantize_states(quantize_states(states), head_dim) - states
    largest = states.abs().amax(-1, keepdim=True)
    assert (error.abs() <= largest / 127 * 0.5 * (1 + 1e-5)).all()
    assert error.any()


def test_zeros_and_non_finite_numbers_become_zero():
    states = torch.zeros(2, HEAD_DIM)
    states[1, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 5.0])
    kept = dequantize_states(quantize_states(states), HEAD_DIM)
    assert kept.count_nonzero() == 1
    assert kept[1, 3] == 5.0


def test_a_position_takes_about_half_the_memory_of_bfloat16(tmp_path):
    tiny_models.build("llama2", head_dim=HEAD_DIM).save_pretrained(tmp_path)
    int8, bfloat16 = (
        load(tmp_path, dtype=torch.bfloat16, kv_cache=kv_cache).decoder.new_cache(32).slots.nbytes
        for kv_cache in ("int8", "auto")
    )
    assert int8 / bfloat16 == (HEAD_DIM + 4) / (2 * HEAD_DIM)


@pytest.mark.parametrize("case", ["qwen3-sliding", "llama-narrow-heads", "gemma2"])
def test_results_are_near_those_of_a_cache_in_the_dtype(case, tmp_path):
    """Norms of heads, sliding windows, capped scores, heads that are not whole words."""
    tiny_models.reference(case).save_pretrained(tmp_path)
    tokens = tiny_models.token_ids(case, 2, 60)
    exact, int8 = (
        tiny_models.logits_of(
            load(tmp_path, dtype=torch.float32, kv_cache=kv_cache).decoder, tokens
        )
        for kv_cache in ("auto", "int8")
    )
    change = (int8 - exact).norm() / exact.norm()
    assert 0 < change < 0.05


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("case", ["qwen3-sliding", "llama3.2"])
def test_compiled_kernels_and_pytorch_differ_by_rounding(case, tmp_path):
    """By much less than the cache's precision; a code may fall to the other side of a half."""
    tiny_models.reference(case).save_pretrained(tmp_path)
    tokens = tiny_models.token_ids(case, 2, 300)
    exact = tiny_models.logits_of(load(tmp_path, dtype=torch.float32).decoder, tokens)
    pytorch, native = (
        tiny_models.logits_of(
            load(tmp_path, dtype=torch.float32, kv_cache="int8", compiled=compiled).decoder, tokens
        )
        for compiled in (False, True)
    )
    assert (native - pytorch).norm() < 0.3 * (native - exact).norm()


def test_what_is_not_supported_is_refused(tmp_path, monkeypatch):
    tiny_models.reference("llama2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the KV cache is 'int4'; there are: auto, int8"):
        LayerSkipModel.from_pretrained(tmp_path, kv_cache="int4")
    monkeypatch.setattr(loader.native, "supports", lambda *_: False)
    monkeypatch.setattr(torch_compile, "supports", lambda *_: True)
    with pytest.raises(ValueError, match=r"torch\.compile does not support a KV cache in int8"):
        load(tmp_path, dtype=torch.float32, kv_cache="int8", compiled=True)
