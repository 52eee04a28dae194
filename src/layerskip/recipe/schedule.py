"""The recipe's settings, and its skip rates and exit weights as pure functions of (layer, step).

Symbols and equations are those of LayerSkip (arXiv 2404.16710), section 4.1. A layer index
l runs from 0 to L-1, a step t from 0 to T-1. The exit after layer l is E = l + 1.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

# The settings of the paper's experiments, one model for each regime: 1.5B (24 layers) from scratch,
# Llama2-7B, Llama1-7B on code, 1.5B on TOPv2.
_PRESETS: dict[str, dict[str, Any]] = {
    "pretrain": {
        "p_max": 0.1,
        "e_scale": 0.2,
        "curriculum": "rotational",
        "rotation": 23,
        "dropout_over_steps": "exponential",
    },
    "continual": {"p_max": 0.1, "e_scale": 0.2, "curriculum": "rotational", "rotation": 8},
    "domain": {"p_max": 0.1, "e_scale": 1.0, "curriculum": "rotational", "rotation": 16},
    "task": {"p_max": 0.2, "e_scale": 1.0, "curriculum": "gradual"},
}


def setting(help_text: str, default: Any = MISSING, flags: tuple[str, ...] = ()) -> Any:
    """A field of a dataclass of settings, with its help and its flags if not derived from the name."""
    return field(default=default, metadata={"help": help_text, "flags": flags})


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Layer dropout and early exit loss as in LayerSkip (arXiv 2404.16710, section 4.1).

    An exit E is the number of layers run, 1 to L; E = L is the whole model and always has a loss.
    The defaults are the paper's for continual pretraining. Invalid values raise ValueError here;
    values that do not fit a model raise it in `check_layers`.

    Attributes:
        variant: `LD+EE` uses both parts, `LD` layer dropout only, `EE` early exit loss only.
        p_max: rate at which the last layer is skipped, in [0, 1).
        dropout_over_layers: D(l), the growth of the rate from the first layer to the last.
        dropout_over_steps: S(t), `none` = 1 throughout; `exponential` = from 0 to 1 over training.
        dropout_every: only every n-th layer can be skipped.
        curriculum: the exits with a loss at a step. `rotational`: every `rotation`-th, shifted by
            one each step; `gradual`: from the last down, one more every T/(2L) steps; `all`;
            `none`: the last layer (and `fixed_exits`) only.
        rotation: R of the rotational curriculum.
        exits: the exits the curriculum chooses from; None = every layer.
        exit_every: the exits the curriculum chooses from are every n-th layer.
        fixed_exits: exits with a loss at every step, besides the last layer.
        exit_weighting: e(l), the weight before normalisation: the `paper`'s, `linear` or `equal`.
        e_scale: the paper's e_scale, the weight of early exits against the last layer, >= 0; not
            used where the weights are equal.
        distillation_weight: weight of the KL divergence from the last layer's distribution (its
            gradient stopped) that is added to each earlier exit's loss; 0 = off.
        chunk_tokens: rows of logits in memory at a time, all exits together; None chooses from the
            vocabulary.
        fused_loss: use Liger's fused linear cross entropy where liger-kernel is installed, the
            model is on a GPU, its head is a plain linear layer and nothing is distilled.
        seed: seed of the skipped rows; the same on every device.
    """

    variant: Literal["LD+EE", "LD", "EE"] = setting(
        "Both parts, layer dropout only, or early exit loss only.", "LD+EE"
    )
    p_max: float = setting("Rate at which the last layer is skipped; 0 = no layer dropout.", 0.1)
    dropout_over_layers: Literal["exponential", "linear", "uniform"] = setting(
        "D(l), the growth of the skip rate over the layers.", "exponential"
    )
    dropout_over_steps: Literal["none", "exponential"] = setting(
        "S(t), the growth of the skip rate over training.", "none"
    )
    dropout_every: int = setting("Only every n-th layer can be skipped.", 1)
    curriculum: Literal["rotational", "gradual", "all", "none"] = setting(
        "Exits with a loss at a step: every R-th in rotation, gradually from the last down, all, none.",
        "rotational",
    )
    rotation: int = setting("R of the rotational curriculum.", 8)
    exits: tuple[int, ...] | None = setting(
        "Exits that the curriculum chooses from (default: every layer).", None
    )
    exit_every: int = setting("The curriculum chooses from every n-th layer.", 1)
    fixed_exits: tuple[int, ...] = setting(
        "Exits with a loss at every step, besides the last layer: the ones that will draft.", ()
    )
    exit_weighting: Literal["paper", "linear", "equal"] = setting(
        "e(l), the weights of the exits' losses; equal teaches early exits fastest.", "paper"
    )
    e_scale: float = setting(
        "Weight of early exits against the last layer; not used with equal weights.", 0.2
    )
    distillation_weight: float = setting(
        "Weight of the KL divergence from the last layer in each earlier exit's loss; 0 = off (paper).",
        0.0,
    )
    chunk_tokens: int | None = setting(
        "Rows of logits in memory at a time, those of all exits together.", None
    )
    fused_loss: bool = setting(
        "Use Liger's fused cross entropy where it is installed and fits.", True
    )
    seed: int = setting("Seed of the rows that layer dropout skips.", 0)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal and value not in choices:
                raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(repr, choices))}")
        if not 0 <= self.p_max < 1:
            raise ValueError(f"p_max is {self.p_max}; a rate below 1 is needed, 0 turns it off")
        for name in ("e_scale", "distillation_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be finite and not negative")
        for name in ("dropout_every", "rotation", "exit_every", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self._check_exits()

    def _check_exits(self) -> None:
        for name in ("exits", "fixed_exits"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, int):
                raise ValueError(
                    f"{name} is {value}; it has to be a list of layers, as in [{value}]"
                )
            object.__setattr__(self, name, tuple(value))
            if len(set(value)) != len(value):
                raise ValueError(f"{name} names an exit twice: {list(value)}")
            if any(exit_layer < 1 for exit_layer in value):
                raise ValueError(f"{name} is {list(value)}; an exit is a number of layers, from 1")
        if self.exits is not None and self.exit_every != 1:
            raise ValueError("exits and exit_every both say where exits are; give one of them")
        if self.exits == ():
            raise ValueError("exits is empty; leave it out for every layer, or curriculum='none'")

    @classmethod
    def preset(cls, regime: str, **changes: Any) -> RecipeConfig:
        """The paper's settings for a regime, with fields changed by name.

        Args:
            regime: `pretrain` (from scratch), `continual` (pretraining), `domain` or `task`
                (finetuning).
            changes: fields of this class that replace the preset's.

        Raises:
            ValueError: unknown regime, or a value out of range.
        """
        if regime not in _PRESETS:
            raise ValueError(f"regime is {regime!r}; it can be {', '.join(map(repr, _PRESETS))}")
        return replace(cls(**_PRESETS[regime]), **changes)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError where the recipe does not fit a model of `num_layers` layers."""
        for name in ("exits", "fixed_exits"):
            outside = [e for e in getattr(self, name) or () if e > num_layers]
            if outside:
                raise ValueError(
                    f"{name} names {outside}, but the model has {num_layers} layers: "
                    f"an exit is 1 to {num_layers}"
                )
        if self.exit_weighting == "paper" and 1 in self.fixed_exits and num_layers > 1:
            raise ValueError(
                "fixed_exits names 1, whose weight is 0 with exit_weighting 'paper': 'linear' or 'equal'"
                " give it one"
            )
        if self.variant != "EE" and self.p_max and self.dropout_every > num_layers:
            raise ValueError(
                f"dropout_every is {self.dropout_every}, but the model has {num_layers} layers: none "
                "would ever be skipped; p_max 0 says so"
            )
        candidates = len(self.candidates(num_layers))
        if candidates == 0:
            raise ValueError(
                f"exit_every is {self.exit_every}, but the model has {num_layers} layers"
            )
        if self.variant == "LD":
            return
        is_control = num_layers == 1 or (self.curriculum == "none" and not self.fixed_exits)
        if not is_control and not self.exits_with_loss(num_layers):
            advice = "name others in exits or fixed_exits"
            if self.exit_weighting == "paper":
                advice += ", or another exit_weighting"
            if self.e_scale == 0 and self.exit_weighting != "equal":
                advice = "e_scale is 0 (for layer dropout alone, say variant 'LD')"
            raise ValueError(f"no exit before the last layer would have a loss: {advice}")
        if self.curriculum == "rotational" and self.rotation > candidates:
            raise ValueError(
                f"rotation is {self.rotation}, but there are {candidates} exits to rotate over: "
                f"some steps would have none; use at most {candidates}"
            )

    def exits_with_loss(self, num_layers: int) -> list[int]:
        """The exits before the last layer that have a loss at some step, ascending."""
        if self.variant == "LD":
            return []
        candidates = () if self.curriculum == "none" else self.candidates(num_layers)

        def has_weight(exit_layer: int) -> bool:
            return exit_scale(exit_layer - 1, num_layers, self.exit_weighting, self.e_scale) > 0

        exits = {e for e in (*self.fixed_exits, *candidates) if e < num_layers}
        return sorted(filter(has_weight, exits))

    def candidates(self, num_layers: int) -> tuple[int, ...]:
        """The exits the curriculum chooses from, ascending."""
        if self.exits is not None:
            return tuple(sorted(self.exits))
        return tuple(range(self.exit_every, num_layers + 1, self.exit_every))


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
        ValueError: the shape needs the number of steps and it is unknown.
    """
    if shape == "none":
        return 1.0
    total_steps = _required(total_steps, "dropout_over_steps='exponential'")
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
        ValueError: the gradual curriculum does not know the number of steps.
    """
    if recipe.variant == "LD":
        return (num_layers,)
    candidates = recipe.candidates(num_layers)
    enabled: tuple[int, ...]
    if recipe.curriculum == "all":
        enabled = candidates
    elif recipe.curriculum == "rotational":
        enabled = candidates[step % recipe.rotation :: recipe.rotation]
    elif recipe.curriculum == "gradual":
        total_steps = _required(total_steps, "curriculum='gradual'")
        opened = 2 * num_layers * step // total_steps
        enabled = tuple(e for e in candidates if e >= num_layers - opened)
    else:
        enabled = ()
    return tuple(sorted({*enabled, *recipe.fixed_exits, num_layers}))


def exit_weights(
    recipe: RecipeConfig, num_layers: int, step: int, total_steps: int | None
) -> dict[int, float]:
    """e~(t, l): the normalised weight of every enabled exit; they sum to 1.

    Exits of weight 0 are left out: with the paper's weights, the exit after the first layer.
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


def _required(total_steps: int | None, what: str) -> int:
    if total_steps is None:
        raise ValueError(f"{what} needs the number of training steps: set_step(step, total_steps)")
    return total_steps
