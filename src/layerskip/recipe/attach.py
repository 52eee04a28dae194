"""Put the recipe on a transformers causal LM, and take it off again.

Nothing is added to the module tree: the `forward` of the model and of each decoder layer is
replaced on the instance, so state-dict names, devices, hooks, PEFT and FSDP wrappers stay as they
are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from layerskip.recipe.anatomy import find_anatomy, transformers_model
from layerskip.recipe.attached import HANDLE, AttachedRecipe
from layerskip.recipe.config import RecipeConfig
from layerskip.recipe.forward_pass import ForwardPass


def attach(model: nn.Module, recipe: RecipeConfig) -> AttachedRecipe:
    """Give a transformers causal LM the recipe: from now on it is used whenever the model trains.

    In training mode the model's forward skips layers, and its loss for given labels is the weighted
    loss of the exits; the logits it returns are then those of the last position. In evaluation mode
    it is the model as it was. Attach before the model is wrapped (DDP, FSDP, torch.compile); PEFT
    may come before or after.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        recipe: the settings.

    Returns:
        The attached recipe; call its `set_step` before each optimizer step.

    Raises:
        ValueError: where the recipe does not fit the model, the model already has one, or its
            layers, final norm and head are not found or do not work as the recipe needs.
    """
    plain_model = transformers_model(model)
    if hasattr(plain_model, HANDLE):
        raise ValueError("the model already has a recipe attached; detach it first")
    anatomy = find_anatomy(plain_model)
    recipe.check_layers(len(anatomy.layers))
    attached = AttachedRecipe(anatomy, recipe)
    try:
        attached._install()
        _probe(attached)
    except ValueError:  # a refusal
        attached._remove()
        raise
    except Exception as error:
        attached._remove()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        anatomy.refuse(f"rows that skip layers: {reason}")
    return attached


def detach(model: nn.Module) -> None:
    """Take the recipe off a model: it is what it was before `attach`, with the weights it has now.

    Raises:
        ValueError: where the model has no recipe.
    """
    plain_model = transformers_model(model)
    attached = getattr(plain_model, HANDLE, None)
    if attached is None:
        raise ValueError("the model has no recipe attached")
    attached._remove()


def _probe(attached: AttachedRecipe) -> None:
    """Try the parts on three short rows: refuse a model on which they do not add up.

    With row 0 skipping every other layer and row 2 the rest, row 1 must come out as without (where
    layers hand things on to each other, its place among the rows changes meanwhile), and the shared
    exit must give the logits that the model gives.
    """
    inputs: dict[str, Any] = {**attached._anatomy.probe_inputs()}
    if not inputs:
        return
    wanted = frozenset({attached.num_layers})
    turns = torch.tensor([[True, False, False], [False, False, True]], device="cpu")
    skipped = turns.repeat(attached.num_layers, 1)[: attached.num_layers]
    with attached._anatomy.probing():
        with attached._running(ForwardPass(None, wanted)) as whole:
            inputs = {**inputs, **attached._without_balancing(), "use_cache": False}
            logits = attached._plain_forward(**inputs).logits[0]
        with attached._running(ForwardPass(skipped, wanted)) as partial:
            attached._plain_forward(**attached._without_logits(inputs))
        if attached.num_layers not in whole.states or attached.num_layers not in partial.states:
            attached._anatomy.refuse("its decoder does not call its layers one after the other")
        state = whole.states[attached.num_layers]
        if not _close(attached._anatomy.shared_exit(state[0]), logits):
            attached._anatomy.refuse("its logits are not head(norm(hidden states))")
    if not _close(partial.states[attached.num_layers][1], state[1]):
        attached._anatomy.refuse("its layers do not treat the rows of a batch independently")


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding, which a different number of rows changes and deep models amplify."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    distance, length = (actual - expected).float().norm(), expected.float().norm()
    return bool(distance <= tolerance * length)
