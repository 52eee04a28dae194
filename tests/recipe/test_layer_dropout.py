import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerskip.recipe.layer_dropout import run_on_kept_rows, sample_skipped_rows, skip_layer

RATES = (0.0, 0.3, 0.6, 1.0)


def sample(rows=8, **changes):
    return sample_skipped_rows(RATES, rows, **{"seed": 0, "step": 0, "micro_batch": 0, **changes})


def test_a_sample_depends_on_its_arguments_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = sample(64)
    assert torch.equal(torch.rand(1), expected)  # the global generator is not used
    assert torch.equal(first, sample(64))
    with torch.device("meta"):
        assert torch.equal(sample(64), first)
    for other in ({"seed": 1}, {"step": 1}, {"micro_batch": 1}):
        assert not torch.equal(first, sample(64, **other))


@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 10**6), st.integers(0, 10**6))
@settings(deadline=None)
def test_a_device_with_fewer_rows_draws_the_first_of_them(few, many, seed, step):
    few, many = sorted((few, many))
    assert torch.equal(
        sample(few, seed=seed, step=step), sample(many, seed=seed, step=step)[:, :few]
    )


def test_rates_are_met():
    shares = sample(20_000).float().mean(1)
    assert torch.allclose(shares, torch.tensor(RATES), atol=0.02)


def test_masks_positions_and_rotary_tables_are_sliced_with_the_rows():
    rows, tokens = 3, 3  # equal on purpose: shapes alone cannot tell them apart
    seen = {}

    def layer(hidden, mask, **kwargs):
        seen.update(kwargs, mask=mask, hidden=hidden)
        return (hidden + 1, "weights")

    hidden = torch.arange(9.0).reshape(3, 3, 1)
    cos = torch.arange(9.0).reshape(rows, tokens, 1)
    positions = torch.arange(9).reshape(3, 3)
    cache_position = torch.arange(tokens)
    shared_rotary = torch.ones(tokens, 2)
    out, rest = run_on_kept_rows(
        layer,
        torch.tensor([False, True, False]),
        hidden,
        (cos[:, None],),
        {
            "position_ids": positions,
            "position_embeddings": (cos, {"local": cos, "all": shared_rotary}),
            "broadcast": torch.ones(1, tokens, tokens),
            "cache_position": cache_position,
            "name": "x",
            "nothing": None,
        },
    )
    kept = [0, 2]
    assert torch.equal(seen["hidden"], hidden[kept])
    assert torch.equal(seen["mask"], cos[kept][:, None])
    assert torch.equal(seen["position_ids"], positions[kept])
    assert torch.equal(seen["position_embeddings"][0], cos[kept])
    assert torch.equal(seen["position_embeddings"][1]["local"], cos[kept])
    assert seen["position_embeddings"][1]["all"] is shared_rotary
    assert seen["broadcast"].shape == (1, tokens, tokens)
    assert seen["cache_position"] is cache_position
    assert rest == "weights"
    assert torch.equal(out.flatten(), torch.tensor([1.0, 2, 3, 3, 4, 5, 7, 8, 9]))


def test_gradient_of_a_skipped_row_passes_unchanged():
    hidden = torch.ones(2, 1, 1, requires_grad=True)
    out = run_on_kept_rows(lambda x: 3 * x, torch.tensor([True, False]), hidden, (), {})
    out.sum().backward()
    assert hidden.grad.flatten().tolist() == [1, 3]


def test_a_layer_all_rows_skip_has_a_gradient_of_zero():
    hidden, weight = torch.ones(2, 1, 1, requires_grad=True), torch.ones(3, requires_grad=True)
    skip_layer(hidden, [weight]).sum().backward()
    assert hidden.grad.flatten().tolist() == [1, 1]
    assert weight.grad.tolist() == [0, 0, 0]


def test_what_cannot_be_sliced_is_refused():
    for name in ("cache", "past_key_values", "layer_past", "cu_seq_lens_q"):
        with pytest.raises(ValueError, match=f"cannot take rows out of .*{name}"):
            run_on_kept_rows(
                lambda x, **_: x,
                torch.tensor([True, False]),
                torch.ones(2, 1, 1),
                (),
                {name: object()},
            )


def test_flex_attention_masks_are_refused():
    mask = type("BlockMask", (), {})()
    with pytest.raises(ValueError, match="flex attention"):
        run_on_kept_rows(
            lambda x, _: x, torch.tensor([True, False]), torch.ones(2, 1, 1), (mask,), {}
        )
