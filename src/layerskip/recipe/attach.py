"""Attach the recipe to a transformers causal LM, and detach it again.

Nothing is added to the module tree: the `forward` of the model and of each decoder layer is
replaced on the instance, so state-dict names, devices, hooks, PEFT and FSDP wrappers stay as they
are.

The rows that skip a layer are sampled once per forward pass, before any layer runs. Gradient
checkpointing wraps a layer's own forward, below the replaced one, so a recomputation gets the kept
rows only.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerskip.recipe.exit_loss import (
    IGNORED_LABEL,
    ExitLosses,
    at_least_one,
    exit_losses,
    fused_loss,
)
from layerskip.recipe.layer_dropout import run_on_kept_rows, sample_skipped_rows, skip_layer
from layerskip.recipe.model_parts import (
    ModelParts,
    compiled_below,
    find_model_parts,
    not_compiled,
    transformers_model,
)
from layerskip.recipe.schedule import RecipeConfig, exit_weights, skip_rates

Forward = Callable[..., Any]
HANDLE = "_layerskip_recipe"  # attribute of the model that holds the attached recipe


@dataclass
class ForwardPass:
    """The rows that skip each layer, and the hidden states and router logits of one forward pass.

    Attributes:
        skipped: bool [layers, B], True = skipped; None = no layer dropout.
        exits: exits whose hidden states are collected.
        states: hidden states [B, T, D] that left exit E.
        router_logits: (layer, [tokens, experts]) of a mixture of experts.
        num_extra_outputs: values that a layer returns in a tuple after its hidden states; None = no
            tuple.
        is_running: False after the pass; `skipped` is still used by recomputation in backward, which
            collects nothing.
    """

    skipped: Tensor | None
    exits: frozenset[int] = frozenset()
    states: dict[int, Tensor] = field(default_factory=dict)
    router_logits: list[tuple[int, Tensor]] = field(default_factory=list)
    num_extra_outputs: int | None = None
    is_running: bool = True

    @compiled_below
    def run_layer(
        self, number: int, layer: nn.Module, plain: Forward, *args: Any, **kwargs: Any
    ) -> Any:
        """Run layer `number`, from 0, on the rows that do not skip it, and collect its output."""
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        skipped = None if self.skipped is None else self.skipped[number]
        output: Any
        if skipped is None or not skipped.any():
            output = plain(hidden, *args, **kwargs)
            self.num_extra_outputs = len(output) - 1 if isinstance(output, tuple) else None
        elif skipped.all():
            output = skip_layer(hidden, [p for p in layer.parameters() if p.requires_grad])
            if self.num_extra_outputs is not None:
                output = (output, *[None] * self.num_extra_outputs)
        else:
            output = run_on_kept_rows(plain, skipped, hidden, args, kwargs)
        if self.is_running and number + 1 in self.exits:
            self.states[number + 1] = output[0] if isinstance(output, tuple) else output
        return output

    @not_compiled
    def add_router_logits(self, number: int, logits: Tensor) -> None:
        """Collect the router logits [tokens, experts] of layer `number`."""
        self.router_logits.append((number, logits))

    def balancing_loss(self, mask: Tensor | None, top_k: int) -> Tensor:
        """Return transformers' load balancing loss over the tokens that each layer routed.

        Padding and skipped rows are taken out here: given a mask, the function of transformers would
        assume that every layer routed the whole batch.

        Args:
            mask: int [B, T], 0 = padding; another kind of mask is taken as no padding.
            top_k: experts a token is sent to.
        """
        # Slow to import, and most models have no experts.
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        routed: list[Tensor] = []
        for number, logits in self.router_logits:
            if mask is not None and mask.ndim == 2:
                kept_mask = (
                    mask if self.skipped is None else mask[~self.skipped[number].to(mask.device)]
                )
                logits = logits[kept_mask.flatten() > 0]
            routed.append(logits.float())
        loss_func: Any = load_balancing_loss_func  # its types allow one layer only
        loss: Tensor = loss_func(tuple(routed), routed[0].shape[-1], top_k)
        return loss


class AttachedRecipe:
    """A recipe attached to a model by `attach`; a training loop calls `set_step`.

    Attributes:
        recipe: the settings.
        num_layers: L of the model.
        last: losses of the latest training pass, None before the first.
    """

    def __init__(self, parts: ModelParts, recipe: RecipeConfig) -> None:
        self.recipe = recipe
        self.num_layers = len(parts.layers)
        self.last: ExitLosses | None = None
        self._parts = parts
        self._pass = ForwardPass(None, is_running=False)  # the current one, or the latest
        self._step: int | None = None
        self._total_steps: int | None = None
        self._micro_batch = 0
        self._eval_exits: tuple[int, ...] = ()
        self._attached = True
        self._hooks: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, Forward | None, Forward]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedRecipe:
        raise ValueError(
            "a model with a recipe attached cannot be copied: the copy would train the weights of the "
            "first one. Copy it before `attach`, or after `detach`"
        )

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        """Set the optimizer step, before its first (micro-)batch.

        Skip rates, exit weights and skipped rows are functions of the step, so evaluation,
        accumulation and a resume do not change them.

        Args:
            step: optimizer steps done so far, from 0.
            total_steps: optimizer steps of the whole training; only recipes that change over
                training need it.
        """
        if step < 0 or (total_steps is not None and total_steps < 1):
            raise ValueError(f"step is {step} of {total_steps}; steps count from 0")
        # Computed once here, so that a missing total_steps raises now and not in a forward pass.
        skip_rates(self.recipe, self.num_layers, step, total_steps)
        exit_weights(self.recipe, self.num_layers, step, total_steps)
        self._step, self._total_steps, self._micro_batch = step, total_steps, 0

    @property
    def skip_rates(self) -> tuple[float, ...]:
        """p_{l,t} of every layer at the present step."""
        return skip_rates(self.recipe, self.num_layers, self._known_step(), self._total_steps)

    @property
    def exit_weights(self) -> dict[int, float]:
        """Normalised weight of every exit that has a loss at the present step."""
        return exit_weights(self.recipe, self.num_layers, self._known_step(), self._total_steps)

    def evaluate(
        self, exits: Iterable[int], batch: Mapping[str, Any], model: nn.Module | None = None
    ) -> ExitLosses:
        """Return each exit's loss and accuracy on a batch, without gradients and dropout of any kind.

        Args:
            exits: exits to evaluate; the last layer is always added.
            batch: keyword arguments of the model's forward, with `labels` or `shift_labels`.
            model: the wrapped model, if any (FSDP needs its wrapper's call).
        """
        if batch.get("labels") is None and batch.get("shift_labels") is None:
            raise ValueError("the batch has no labels")
        inputs = {k: v for k, v in batch.items() if k != "num_items_in_batch"}
        self._eval_exits = tuple(sorted({*exits, self.num_layers}))
        before = self.last
        try:
            with self._parts.evaluating():
                (model or self._parts.model)(**inputs)
            losses = self.last
            assert losses is not None
            return losses
        finally:
            self._eval_exits, self.last = (), before

    def _known_step(self) -> int:
        if self._step is None:
            raise ValueError(
                "the recipe does not know the training step: call "
                "attach(...).set_step(step, total_steps) before each optimizer step, add "
                "layerskip.training.RecipeCallback to a Trainer, or use LayerSkipTrainer"
            )
        return self._step

    @compiled_below
    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Replace the model's forward: in training, layer dropout and the early exit loss."""
        if args:  # labels may be positional
            bound = inspect.signature(self._plain_forward).bind_partial(*args).arguments
            kwargs = {**bound, **kwargs}
        labels = shifted_labels(kwargs.get("labels"), kwargs.get("shift_labels"))
        if exits := self._eval_exits:
            assert labels is not None
            weights = dict.fromkeys(exits, 1 / len(exits))
            with self._running(ForwardPass(None, frozenset(exits))) as current:
                return self._forward_with_loss(current, kwargs, labels, weights)
        if not (self._parts.model.training and torch.is_grad_enabled()):
            self._pass = ForwardPass(
                None, num_extra_outputs=self._pass.num_extra_outputs, is_running=False
            )
            return self._plain_forward(**kwargs)
        weights = {} if labels is None else self.exit_weights
        # 1. Sample the rows that skip each layer.
        skipped = self._sample_skipped(kwargs)
        with self._running(ForwardPass(skipped, frozenset(weights))) as current:
            if labels is None:
                kwargs.setdefault("use_cache", False)
                return self._plain_forward(**{**kwargs, **self._without_balancing()})
            return self._forward_with_loss(current, kwargs, labels, weights)

    @compiled_below
    def _forward_with_loss(
        self,
        current: ForwardPass,
        kwargs: dict[str, Any],
        labels: Tensor,
        weights: dict[int, float],
    ) -> Any:
        if kwargs.get("fused_lm_head"):
            raise ValueError(
                "this trainer computes the loss itself (fused_lm_head): give it LayerSkipMixin, as in"
                " class Mine(LayerSkipMixin, SFTTrainer)"
            )
        num_items = kwargs.pop("num_items_in_batch", None)
        if isinstance(num_items, Tensor):
            num_items = num_items.to(labels.device)
        kwargs.pop("labels", None)
        kwargs.pop("shift_labels", None)
        as_tuple = kwargs.pop("return_dict", None) is False
        # 2. Run each layer on its kept rows, and collect the hidden states of the exits.
        outputs = self._plain_forward(**self._without_logits(kwargs), return_dict=True)
        # 3. Compute the early exit loss from them.
        distillation_weight = 0.0 if self._eval_exits else self.recipe.distillation_weight
        losses = self._losses(current, labels, weights, num_items, distillation_weight)
        self.last = losses
        loss = losses.loss
        if current.router_logits:
            config, mask = self._parts.model.config, kwargs.get("attention_mask")
            balance = current.balancing_loss(mask, config.num_experts_per_tok)
            # With accumulation each batch contributes in proportion to its labels, as in the loss.
            fraction = 1.0 if num_items is None else losses.tokens / at_least_one(num_items)
            loss = loss + config.router_aux_loss_coef * fraction * balance.to(loss.device)
        result = type(outputs)(loss=loss, **{k: v for k, v in outputs.items() if k != "loss"})
        return result.to_tuple() if as_tuple else result

    @not_compiled
    def _losses(
        self,
        current: ForwardPass,
        labels: Tensor,
        weights: dict[int, float],
        num_items: Tensor | float | None,
        distillation_weight: float,
    ) -> ExitLosses:
        fused = None
        if self.recipe.fused_loss and not distillation_weight:
            fused = fused_loss(self._parts, labels.device)
        return exit_losses(
            current.states,
            labels,
            weights,
            self._parts.shared_exit,
            self._parts.exit_parameters(),
            num_items=num_items,
            distillation_weight=distillation_weight,
            chunk_tokens=self.recipe.chunk_tokens,
            vocab_size=self._parts.vocab_size,
            fused=fused,
        )

    @not_compiled
    def _sample_skipped(self, kwargs: dict[str, Any]) -> Tensor | None:
        rates = self.skip_rates
        micro_batch, self._micro_batch = self._micro_batch, self._micro_batch + 1
        if not any(rates):
            return None
        names = ("input_ids", "inputs_embeds", *kwargs)
        inputs = next(kwargs[n] for n in names if isinstance(kwargs.get(n), Tensor))
        step = self._known_step()
        return sample_skipped_rows(
            rates, inputs.shape[0], seed=self.recipe.seed, step=step, micro_batch=micro_batch
        )

    def _without_logits(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Have the model compute the logits of one position only: the exit loss computes its own.

        A tensor and not a number, with which some models (Gemma 4) drop the other positions' states.
        """
        if self._parts.has_logits_to_keep:
            kwargs = {**kwargs, "logits_to_keep": torch.tensor([-1], device="cpu")}
        return {"use_cache": False, **kwargs, **self._without_balancing()}

    def _without_balancing(self) -> dict[str, Any]:
        """Turn off the model's load balancing loss, which assumes that every layer ran every row."""
        return {"output_router_logits": False} if self._parts.is_balanced_mixture else {}

    @contextmanager
    def _running(self, current: ForwardPass) -> Iterator[ForwardPass]:
        """Collect states during the pass; the skipped rows stay for recomputation in backward."""
        current.num_extra_outputs = self._pass.num_extra_outputs
        self._pass = current
        try:
            yield current
        finally:
            self._pass = ForwardPass(
                current.skipped, num_extra_outputs=current.num_extra_outputs, is_running=False
            )

    @compiled_below
    def _layer_forward(self, number: int, plain: Forward, *args: Any, **kwargs: Any) -> Any:
        """Replace the forward of layer `number`, from 0: skipped rows pass unchanged."""
        # A pass that is over applies to recomputation in backward only.
        if not (self._pass.is_running or _is_in_backward()):
            return plain(*args, **kwargs)
        layer = self._parts.layers[number]
        return self._pass.run_layer(number, layer, plain, *args, **kwargs)

    def _router_hook(self, number: int, index: int, _: nn.Module, __: Any, output: Any) -> None:
        if self._pass.is_running:
            logits = output[index] if isinstance(output, tuple) else output
            self._pass.add_router_logits(number, logits)

    def _install(self) -> None:
        setattr(self._parts.model, HANDLE, self)
        self._plain_forward = self._replace(self._parts.model, self._forward)
        for number, layer in enumerate(self._parts.layers):
            plain = layer.__dict__.get("forward", functools.partial(_class_forward, layer))
            self._replace(layer, functools.partial(self._layer_forward, number, plain))
            if self._parts.is_balanced_mixture:
                for router, index in self._parts.routers(layer):
                    hook = functools.partial(self._router_hook, number, index)
                    self._hooks.append(router.register_forward_hook(hook))
        if self._parts.is_balanced_mixture and not self._hooks:
            self._parts.refuse("its routers are not found: leave output_router_logits out")

    def _replace(self, module: nn.Module, forward: Forward) -> Forward:
        plain: Forward = module.forward
        before: Forward | None = module.__dict__.get("forward")

        # `wraps` keeps the signature: Trainer reads the names of columns and loss arguments from it.
        @functools.wraps(plain)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if args and args[0] is module:  # Accelerate binds it when it removes its own wrapper
                args = args[1:]
            return (forward if self._attached else plain)(*args, **kwargs)

        module.forward = replacement
        self._replaced.append((module, before, replacement))
        return plain

    def _remove(self) -> None:
        self._attached = False
        for module, before, replacement in self._replaced:
            # A wrapper added since (Accelerate's autocast) stays, and calls the plain forward.
            current = module.__dict__.get("forward")
            if getattr(current, "__func__", current) is replacement:
                del module.forward
                if before is not None:
                    module.forward = before
        for hook in self._hooks:
            hook.remove()
        delattr(self._parts.model, HANDLE)


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _class_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward of the layer's present class, which FSDP2 changes."""
    return type(layer).forward(layer, *args, **kwargs)


def shifted_labels(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """Shift labels, as transformers models take them, to the token each position predicts, [B, T]."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)


def attach(model: nn.Module, recipe: RecipeConfig) -> AttachedRecipe:
    """Attach the recipe to a transformers causal LM.

    In training mode the model's forward then skips layers, and its loss for given labels is the
    weighted loss of the exits; the logits it returns are those of the last position. In evaluation
    mode the model is unchanged. Attach before the model is wrapped (DDP, FSDP, torch.compile); PEFT
    may come before or after.

    Args:
        model: a causal LM of transformers, or a PEFT model around one.
        recipe: the settings.

    Returns:
        The attached recipe; call its `set_step` before each optimizer step.

    Raises:
        ValueError: the recipe does not fit the model, the model already has one, or its layers,
            final norm and head are not found or do not work as the recipe needs.
    """
    plain_model = transformers_model(model)
    if hasattr(plain_model, HANDLE):
        raise ValueError("the model already has a recipe attached; detach it first")
    parts = find_model_parts(plain_model)
    recipe.check_layers(len(parts.layers))
    attached = AttachedRecipe(parts, recipe)
    try:
        attached._install()
        _probe(attached)
    except ValueError:  # a refusal
        attached._remove()
        raise
    except Exception as error:
        attached._remove()
        reason = (str(error) or type(error).__name__).splitlines()[0]
        parts.refuse(f"rows that skip layers: {reason}")
    return attached


def detach(model: nn.Module) -> None:
    """Detach the recipe: the model is as before `attach`, with its present weights.

    Raises:
        ValueError: the model has no recipe.
    """
    plain_model = transformers_model(model)
    attached = getattr(plain_model, HANDLE, None)
    if attached is None:
        raise ValueError("the model has no recipe attached")
    attached._remove()


def _probe(attached: AttachedRecipe) -> None:
    """Run the recipe on three short rows, and refuse a model on which it does not work.

    Row 0 skips every other layer and row 2 the rest, so the index of row 1 changes between layers; it
    must come out as without skipping, and the shared exit must give the model's logits.
    """
    inputs: dict[str, Any] = {**attached._parts.probe_inputs()}
    if not inputs:
        return
    last = frozenset({attached.num_layers})
    alternating = torch.tensor([[True, False, False], [False, False, True]], device="cpu")
    skipped = alternating.repeat(attached.num_layers, 1)[: attached.num_layers]
    with attached._parts.probing():
        with attached._running(ForwardPass(None, last)) as whole:
            inputs = {**inputs, **attached._without_balancing(), "use_cache": False}
            logits = attached._plain_forward(**inputs).logits[0]
        with attached._running(ForwardPass(skipped, last)) as partial:
            attached._plain_forward(**attached._without_logits(inputs))
        if attached.num_layers not in whole.states or attached.num_layers not in partial.states:
            attached._parts.refuse("its decoder does not call its layers one after the other")
        state = whole.states[attached.num_layers]
        if not _close(attached._parts.shared_exit(state[0]), logits):
            attached._parts.refuse("its logits are not head(norm(hidden states))")
    if not _close(partial.states[attached.num_layers][1], state[1]):
        attached._parts.refuse("its layers do not treat the rows of a batch independently")


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Compare up to rounding, which depends on the number of rows and grows with depth."""
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    distance, length = (actual - expected).float().norm(), expected.float().norm()
    return bool(distance <= tolerance * length)
