"""The recipe's maths: rates and weights as pure functions of (layer, step).

Symbols and equations are those of LayerSkip (arXiv 2404.16710), section 4.1. A layer index
l runs from 0 to L-1, a step t from 0 to T-1. The exit after layer l is E = l + 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from layerskip.recipe.config import RecipeConfig


def dropout_over_layers(layer: int, num_layers: int, shape: str) -> float:
    """D(l): 0 at the first layer and 1 at the last; `uniform` is 1 everywhere.

    Exponential: `D(l) = exp(l ln2 / (L-1)) - 1`. The only layer of a one-layer model
    counts as the first.
    """
    if shape == "uniform":
        return 1.0
    if num_layers == 1:
        return 0.0
    depth = layer / (num_layers - 1)
    return depth if shape == "linear" else math.exp(depth * math.log(2)) - 1


def dropout_over_steps(step: int, total_steps: int | None, shape: str) -> float:
    """S(t): 1, or `exp(t ln2 / (T-1)) - 1` where the rate grows over training.

    Raises:
        ValueError: where the shape needs the number of steps and it is not known.
    """
    if shape == "none":
        return 1.0
    total_steps = _known(total_steps, "dropout_over_steps='exponential'")
    if total_steps == 1:
        return 1.0
    progress = min(step / (total_steps - 1), 1.0)
    return math.exp(progress * math.log(2)) - 1


def skip_rates(
    recipe: RecipeConfig, num_layers: int, step: int, total_steps: int | None
) -> tuple[float, ...]:
    """p_{l,t} = S(t) D(l) p_max for every layer: the rate at which a row skips it."""
    if recipe.variant == "EE" or recipe.p_max == 0:
        return (0.0,) * num_layers
    scale = recipe.p_max * dropout_over_steps(step, total_steps, recipe.dropout_over_steps)
    return tuple(
        scale * dropout_over_layers(layer, num_layers, recipe.dropout_over_layers)
        if (layer + 1) % recipe.dropout_every == 0
        else 0.0
        for layer in range(num_layers)
    )


def exit_scale(layer: int, num_layers: int, weighting: str, e_scale: float) -> float:
    """e(l): the weight of the exit after layer l, before normalisation.

    The paper's is `e_scale * sum_{i=0..l} i`, and for the last layer
    `(L-1) + e_scale * sum_{i=0..L-2} i`. `linear` is l + 1, times e_scale below the last layer;
    `equal` is 1.
    """
    is_last = layer == num_layers - 1
    if weighting == "paper":
        if is_last:
            return layer + e_scale * _sum_up_to(layer - 1)
        return e_scale * _sum_up_to(layer)
    if weighting == "equal":
        return 1.0
    return (layer + 1) * (1.0 if is_last else e_scale)


def enabled_exits(
    recipe: RecipeConfig, num_layers: int, step: int, total_steps: int | None
) -> tuple[int, ...]:
    """C(t, l): the exits that have a loss at this step, ascending; E = L is always one of them.

    Raises:
        ValueError: where the gradual curriculum does not know the number of steps.
    """
    if recipe.variant == "LD":
        return (num_layers,)
    candidates = recipe.candidates(num_layers)
    chosen: tuple[int, ...]
    if recipe.curriculum == "all":
        chosen = candidates
    elif recipe.curriculum == "rotational":
        chosen = candidates[step % recipe.rotation :: recipe.rotation]
    elif recipe.curriculum == "gradual":
        total_steps = _known(total_steps, "curriculum='gradual'")
        opened = 2 * num_layers * step // total_steps
        chosen = tuple(e for e in candidates if e >= num_layers - opened)
    else:
        chosen = ()
    return tuple(sorted({*chosen, *recipe.fixed_exits, num_layers}))


def exit_weights(
    recipe: RecipeConfig, num_layers: int, step: int, total_steps: int | None
) -> dict[int, float]:
    """e~(t, l): the normalised weight of every enabled exit; they sum to 1.

    Exits whose weight is 0 are left out, since nothing of them enters the loss: with the paper's
    weights this is the exit after the first layer.
    """
    exits = enabled_exits(recipe, num_layers, step, total_steps)
    scales = {
        e: exit_scale(e - 1, num_layers, recipe.exit_weighting, recipe.e_scale) for e in exits
    }
    total = sum(scales.values())
    if total == 0:  # a one-layer model with the paper's weights
        return {num_layers: 1.0}
    return {e: weight for e, scale in scales.items() if (weight := scale / total) > 0}


def _sum_up_to(n: int) -> float:
    return n * (n + 1) / 2


def _known(total_steps: int | None, what: str) -> int:
    if total_steps is None:
        raise ValueError(f"{what} needs the number of training steps: set_step(step, total_steps)")
    return total_steps
