"""Rates and weights against numbers worked out by hand from the paper's formulas."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerskip.recipe import RecipeConfig
from layerskip.recipe.schedule import (
    dropout_over_layers,
    dropout_over_steps,
    enabled_exits,
    exit_scale,
    exit_weights,
    skip_rates,
)


def test_rate_over_layers():
    # L = 5: 2^(l/4) - 1
    rates = [dropout_over_layers(layer, 5, "exponential") for layer in range(5)]
    assert rates == pytest.approx([0, 0.189207, 0.414214, 0.681793, 1], abs=1e-6)
    assert [dropout_over_layers(layer, 5, "linear") for layer in (0, 1, 4)] == [0, 0.25, 1]
    assert dropout_over_layers(0, 5, "uniform") == 1
    assert dropout_over_layers(0, 1, "exponential") == 0


def test_rate_over_steps():
    # T = 5: 2^(t/4) - 1, and it stays at 1 should training go on
    rates = [dropout_over_steps(step, 5, "exponential") for step in (0, 2, 4, 9)]
    assert rates == pytest.approx([0, 0.414214, 1, 1], abs=1e-6)
    assert dropout_over_steps(3, None, "none") == 1
    assert dropout_over_steps(0, 1, "exponential") == 1
    with pytest.raises(ValueError, match="number of training steps"):
        dropout_over_steps(3, None, "exponential")


def test_skip_rates():
    recipe = RecipeConfig(p_max=0.2, dropout_over_steps="exponential")
    # S(2 of 5) = 0.414214, D = 0 .. 1 for L = 3
    expected = [0, 0.2 * 0.414214 * 0.414214, 0.2 * 0.414214]
    assert skip_rates(recipe, 3, 2, 5) == pytest.approx(expected, abs=1e-6)
    every = RecipeConfig(p_max=0.2, dropout_over_layers="uniform", dropout_every=2)
    assert skip_rates(every, 4, 0, None) == (0, 0.2, 0, 0.2)
    assert skip_rates(RecipeConfig(variant="EE"), 3, 0, None) == (0, 0, 0)


def test_exit_scale_of_the_paper():
    # L = 5, e_scale = 0.2: 0.2 * (0, 1, 3, 6), and 4 + 0.2 * 6 for the last
    scales = [exit_scale(layer, 5, "paper", 0.2) for layer in range(5)]
    assert scales == pytest.approx([0, 0.2, 0.6, 1.2, 5.2])
    # e_scale = 1: the sums of 0..l, and 4 + 6 for the last, which is the sum of 0..4
    assert [exit_scale(layer, 5, "paper", 1.0) for layer in range(5)] == [0, 1, 3, 6, 10]


def test_other_exit_scales():
    assert [exit_scale(layer, 3, "equal", 0.2) for layer in range(3)] == [1, 1, 1]
    linear = [exit_scale(layer, 3, "linear", 0.5) for layer in range(3)]
    assert linear == [0.5, 1.0, 3.0]


def test_exit_weights_are_normalised_over_enabled_exits():
    recipe = RecipeConfig(curriculum="all", e_scale=0.2)
    # 0.2, 0.6, 1.2, 5.2 of 7.2; the exit after the first layer has weight 0 and is left out
    weights = exit_weights(recipe, 5, 0, None)
    assert weights == pytest.approx({2: 1 / 36, 3: 1 / 12, 4: 1 / 6, 5: 26 / 36})


def test_rotation_shifts_by_one_each_step():
    recipe = RecipeConfig(rotation=3)
    exits = [enabled_exits(recipe, 8, step, None) for step in range(4)]
    assert exits == [(1, 4, 7, 8), (2, 5, 8), (3, 6, 8), (1, 4, 7, 8)]


def test_gradual_opens_a_layer_every_t_over_2l_steps():
    recipe = RecipeConfig(curriculum="gradual")
    # L = 4, T = 80: one more every 10 steps
    exits = {step: enabled_exits(recipe, 4, step, 80) for step in (0, 9, 10, 29, 30, 79)}
    assert exits == {
        0: (4,), 9: (4,), 10: (3, 4), 29: (2, 3, 4), 30: (1, 2, 3, 4), 79: (1, 2, 3, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match="number of training steps"):
        enabled_exits(recipe, 4, 0, None)


def test_named_exits():
    recipe = RecipeConfig(exits=(4, 6, 10), fixed_exits=(8,), rotation=3, exit_weighting="equal")
    exits = [enabled_exits(recipe, 30, step, None) for step in range(4)]
    assert exits == [(4, 8, 30), (6, 8, 30), (8, 10, 30), (4, 8, 30)]
    assert exit_weights(recipe, 30, 0, None) == pytest.approx({4: 1 / 3, 8: 1 / 3, 30: 1 / 3})
    every = RecipeConfig(exit_every=4, curriculum="all")
    assert enabled_exits(every, 10, 0, None) == (4, 8, 10)
    assert enabled_exits(RecipeConfig(curriculum="none"), 10, 0, None) == (10,)
    assert enabled_exits(RecipeConfig(variant="LD"), 10, 0, None) == (10,)


@given(
    st.integers(1, 40),
    st.integers(0, 500),
    st.sampled_from(["rotational", "gradual", "all", "none"]),
    st.sampled_from(["paper", "linear", "equal"]),
    st.floats(0, 2),
)
def test_weights_sum_to_one_and_the_last_layer_counts(layers, step, curriculum, weighting, e_scale):
    recipe = RecipeConfig(
        curriculum=curriculum, rotation=1, exit_weighting=weighting, e_scale=e_scale
    )
    weights = exit_weights(recipe, layers, step, 501)
    assert math.isclose(sum(weights.values()), 1)
    assert weights[layers] > 0
    assert all(0 < weight <= 1 for weight in weights.values())


@given(st.integers(2, 60), st.integers(1, 60))
def test_rotation_visits_every_exit_once_a_turn(layers, rotation):
    if rotation > layers:
        return
    recipe = RecipeConfig(rotation=rotation)
    turn = [enabled_exits(recipe, layers, step, None) for step in range(rotation)]
    below = [e for exits in turn for e in exits if e < layers]
    assert sorted(below) == list(range(1, layers))
    assert all(len(exits) <= math.ceil(layers / rotation) + 1 for exits in turn)
