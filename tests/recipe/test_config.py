import pytest

from layerskip.recipe import RecipeConfig


def test_presets_are_the_papers():
    for regime, p_max, e_scale, curriculum, over_steps in (
        ("pretrain", 0.1, 0.2, "rotational", "exponential"),
        ("continual", 0.1, 0.2, "rotational", "none"),
        ("domain", 0.1, 1.0, "rotational", "none"),
        ("task", 0.2, 1.0, "gradual", "none"),
    ):
        recipe = RecipeConfig.preset(regime)
        assert (recipe.p_max, recipe.e_scale) == (p_max, e_scale)
        assert (recipe.curriculum, recipe.dropout_over_steps) == (curriculum, over_steps)


def test_rotations_of_the_presets():
    rotations = [RecipeConfig.preset(r).rotation for r in ("pretrain", "continual", "domain")]
    assert rotations == [23, 8, 16]


def test_a_preset_can_be_changed():
    assert RecipeConfig.preset("task", p_max=0.1).p_max == 0.1


def test_bad_values_are_refused():
    for changes, message in (
        ({"p_max": 1.0}, "p_max is 1.0"),
        ({"e_scale": float("nan")}, "e_scale is nan"),
        ({"distillation_weight": float("inf")}, "distillation_weight is inf"),
        ({"rotation": 0}, "rotation is 0"),
        ({"variant": "EL"}, "variant is 'EL'; it can be 'LD\\+EE', 'LD', 'EE'"),
        ({"exits": (3, 3)}, "names an exit twice"),
        ({"exits": (0, 3)}, "from 1"),
        ({"exits": ()}, "exits is empty"),
        ({"fixed_exits": 8}, r"it has to be a list of layers, as in \[8\]"),
        ({"exits": (3,), "exit_every": 2}, "give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            RecipeConfig(**changes)


def test_unknown_regime():
    with pytest.raises(ValueError, match="it can be 'pretrain', 'continual', 'domain', 'task'"):
        RecipeConfig.preset("finetune")


def test_what_does_not_fit_the_model_is_refused():
    for changes, message in (
        ({"exits": (9,), "rotation": 1}, r"exits names \[9\], but the model has 8 layers"),
        ({"fixed_exits": (9,)}, "fixed_exits names"),
        ({"rotation": 9}, "rotation is 9, but there are 8 exits"),
        ({"exits": (2, 4), "rotation": 3}, "use at most 2"),
        ({"exit_every": 9}, "exit_every is 9"),
        ({"dropout_every": 9}, "dropout_every is 9, but the model has 8 layers"),
        ({"e_scale": 0}, "no exit before the last .* would have a loss: e_scale is 0"),
        ({"e_scale": 0, "curriculum": "none", "fixed_exits": (4,)}, ": e_scale is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RecipeConfig(**changes).check_layers(8)


def test_what_fits_the_model_is_not_refused():
    for changes in (
        {"dropout_every": 8},
        {"dropout_every": 9, "p_max": 0},
        {"e_scale": 0, "exit_weighting": "equal"},
        {"e_scale": 0, "variant": "LD"},
        {"e_scale": 0, "curriculum": "none"},  # a control
    ):
        RecipeConfig(**changes).check_layers(8)
