"""Rotary frequencies and turns against transformers' own functions, float32."""

import dataclasses

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layerskip.model import architecture as ropes
from layerskip.model import decoder as rotary
from layerskip.model import families
from layerskip.model.architecture import Rope
from tiny_models import reference

LLAMA31 = Rope(
    theta=500_000.0,
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
)


class Config:
    """The part of a config that transformers' rotary functions read."""

    head_dim, hidden_size, num_attention_heads, max_position_embeddings = 128, 4096, 32, 131_072

    def __init__(self, rope):
        self.rope_parameters = {
            "rope_type": rope.kind,
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_positions,
        }

    def standardize_rope_params(self):
        """Already in the standard form."""


def test_llama3_frequencies_equal_those_of_transformers():
    for factor, high in ((8.0, 4.0), (32.0, 2.0)):
        rope = Rope(
            theta=500_000.0,
            kind="llama3",
            factor=factor,
            low_freq_factor=1.0,
            high_freq_factor=high,
            original_max_positions=8192,
        )
        expected, scale = ROPE_INIT_FUNCTIONS["llama3"](Config(rope), "cpu")
        assert scale == 1.0
        found = rotary.frequencies(rope, 128)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
        plain = rotary.frequencies(Rope(theta=500_000.0), 128)
        kinds = {torch.isclose(f, p, rtol=1e-6).item() for f, p in zip(found, plain, strict=True)}
        assert kinds == {True, False}  # some were kept, some were scaled


def test_yarn_equals_transformers():
    for more in (
        {},
        {"attn_factor": 0.8782, "beta_fast": 16, "beta_slow": 2},  # the first is not transformers'
        {"attention_factor": 1.25, "truncate": False},
        {"mscale": 1.0, "mscale_all_dim": 0.707},
        {"factor": None},
        {"factor": 1.0},
    ):
        fields = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
        fields |= {"original_max_position_embeddings": 32_768, **more}
        config = Config(Rope())
        config.rope_parameters = fields
        expected, scale = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
        sizes = ("head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings")
        described = {name: getattr(Config, name) for name in sizes}
        (rope,) = ropes.ropes_of(described | {"rope_parameters": fields}, 1)
        torch.testing.assert_close(rotary.frequencies(rope, 128), expected, rtol=5e-7, atol=0.0)
        assert rope.magnitude == pytest.approx(scale)


def test_dynamic_scaling_changes_nothing_within_the_context():
    fields = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = Config(Rope())
    config.rope_parameters = fields
    expected, scale = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=131_072)
    (rope,) = ropes.ropes_of({"rope_parameters": fields}, 1)
    assert torch.equal(rotary.frequencies(rope, 128), expected)
    assert rope.magnitude == scale == 1.0


def test_only_longrope_has_turns_of_its_own_for_long_contexts():
    tiny = families.from_config(reference("llama3.1").config.to_dict())
    long = Rope(original_max_positions=64, long_factors=(2.0,) * (tiny.head_dim // 2))
    for rope, is_longer in ((Rope(original_max_positions=64), False), (long, True)):
        a = dataclasses.replace(tiny, ropes=(rope,) * tiny.n_layers)
        own = rotary.Rotary(a, torch.device("cpu"))
        short, longer = own.table(0, 64), own.table(0, 128)
        assert torch.equal(own.freqs_cis(0, torch.arange(64)[None], 128)[0, :, 0], longer[:64])
        assert torch.equal(short, longer[:64]) != is_longer
        assert rope.alike([64, 128]) != is_longer


def test_frequency_factors_say_the_same_as_llama3_scaling():
    scaled = rotary.frequencies(LLAMA31, 128)
    plain = rotary.frequencies(Rope(theta=500_000.0), 128)
    factors = Rope(theta=500_000.0, frequency_factors=tuple((plain / scaled).tolist()))
    torch.testing.assert_close(rotary.frequencies(factors, 128), scaled, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "case", ["llama3.1", "llama-linear", "phi4-mini", "gemma3", "smollm3", "gpt-neox"]
)
def test_turns_equal_transformers_far_beyond_the_original_context(case):
    model = reference(case)
    a = families.from_config(model.config.to_dict())
    own = rotary.Rotary(a, torch.device("cpu"))
    positions = torch.tensor([[0, 1, 31, 32, 33, 511, 5_000, 131_071]])
    # At position 131,071 one float32 rounding of the angle is 0.008.
    tolerance = {"rtol": 0.0, "atol": 2e-2}
    for layer, rope in enumerate(a.ropes):
        turns = own.freqs_cis(own.kinds[layer], positions, capacity=131_072)
        turned, still = turns.split([a.n_heads + a.n_kv_heads, a.n_kv_heads], dim=2)
        pairs = 0
        if rope is not None:
            pairs = rope.turned(a.head_dim) // 2
            by_kind = "full_attention" in model.config.rope_parameters
            kind = (model.config.layer_types[layer],) if by_kind else ()
            cos, sin = model.base_model.rotary_emb(torch.zeros(1), positions, *kind)
            expected = torch.complex(cos, sin)[:, :, None, :pairs].expand(
                -1, -1, turned.shape[2], -1
            )
            torch.testing.assert_close(turned[..., :pairs], expected, **tolerance)
        for rest in (turned[..., pairs:], still):
            assert torch.equal(rest, torch.ones_like(rest))


def test_interleave_brings_halves_together():
    for shape in ((3 * 8, 5), (3 * 8,)):
        rows = torch.arange(torch.Size(shape).numel()).view(shape)
        mixed = rotary.interleave(rows, 8, 8)
        for head in range(shape[0] // 8):
            for i in range(4):
                assert torch.equal(mixed[head * 8 + 2 * i], rows[head * 8 + i])
                assert torch.equal(mixed[head * 8 + 2 * i + 1], rows[head * 8 + i + 4])


def test_interleave_leaves_what_does_not_turn():
    mixed = rotary.interleave(torch.arange(2 * 8), 8, 4)
    assert mixed.tolist() == [0, 2, 1, 3, 4, 5, 6, 7, 8, 10, 9, 11, 12, 13, 14, 15]
