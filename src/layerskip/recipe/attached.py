"""A recipe on a model: what replaces the forward of the model and of its layers.

The rows a layer skips are drawn once per forward pass, before any layer runs. Gradient
checkpointing wraps a layer's own forward, below the replaced one, so a replay sees the rows already
taken out.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerskip.recipe.anatomy import Anatomy
from layerskip.recipe.compiling import compiled_below, not_compiled
from layerskip.recipe.config import RecipeConfig
from layerskip.recipe.exit_loss import IGNORED_LABEL, ExitLosses, at_least_one, exit_losses
from layerskip.recipe.forward_pass import ForwardPass
from layerskip.recipe.fused_loss import fused_loss
from layerskip.recipe.layer_dropout import draw_skipped_rows
from layerskip.recipe.schedule import exit_weights, skip_rates

HANDLE = "_layerskip_recipe"


class AttachedRecipe:
    """A recipe on a model. `attach` makes it; a training loop tells it the step.

    Attributes:
        recipe: the settings.
        num_layers: L of the model.
        last: losses of the latest training pass, None before the first.
    """

    def __init__(self, anatomy: Anatomy, recipe: RecipeConfig) -> None:
        self.recipe = recipe
        self.num_layers = len(anatomy.layers)
        self.last: ExitLosses | None = None
        self._anatomy = anatomy
        self._pass = ForwardPass(None, is_running=False)  # the one that runs, or the latest
        self._step: int | None = None
        self._total_steps: int | None = None
        self._micro_batch = 0
        self._to_evaluate: tuple[int, ...] = ()
        self._attached = True
        self._hooks: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, Any, Any]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> AttachedRecipe:
        raise ValueError(
            "a model with a recipe attached cannot be copied: the copy would train the weights of the "
            "first one. Copy it before `attach`, or after `detach`"
        )

    def set_step(self, step: int, total_steps: int | None = None) -> None:
        """Say which optimizer step comes next, before its first (micro-)batch.

        Rates, weights and skipped rows depend on it and on nothing that evaluation, accumulation or
        a restart would change.

        Args:
            step: optimizer steps done so far, from 0.
            total_steps: optimizer steps of the whole training; only recipes that change over
                training need it.
        """
        if step < 0 or (total_steps is not None and total_steps < 1):
            raise ValueError(f"step is {step} of {total_steps}; steps count from 0")
        # Looked up now, so that what is missing is said here and not inside a forward pass.
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
        """Each exit's loss and accuracy on a batch with labels: no dropout of any kind, no gradient.

        Args:
            exits: exits to look at; the last layer is always added.
            batch: keyword arguments of the model's forward, `labels` or `shift_labels` among them.
            model: the model as it is wrapped now (FSDP needs its wrapper's call); None = as given.
        """
        if batch.get("labels") is None and batch.get("shift_labels") is None:
            raise ValueError("the batch has no labels")
        inputs = {k: v for k, v in batch.items() if k != "num_items_in_batch"}
        self._to_evaluate = tuple(sorted({*exits, self.num_layers}))
        before = self.last
        try:
            with self._anatomy.evaluating():
                (model or self._anatomy.model)(**inputs)
            losses = self.last
            assert losses is not None
            return losses
        finally:
            self._to_evaluate, self.last = (), before

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
        """The model's forward: its own, but in training with layer dropout and the exits' loss."""
        if args:  # labels may be among those without a name
            named = inspect.signature(self._plain_forward).bind_partial(*args).arguments
            kwargs = {**named, **kwargs}
        labels = shifted_labels(kwargs.get("labels"), kwargs.get("shift_labels"))
        if exits := self._to_evaluate:
            assert labels is not None
            weights = dict.fromkeys(exits, 1 / len(exits))
            with self._running(ForwardPass(None, frozenset(exits))) as this:
                return self._forward_with_losses(this, kwargs, labels, weights)
        if not (self._anatomy.model.training and torch.is_grad_enabled()):
            self._pass = ForwardPass(None, others=self._pass.others, is_running=False)
            return self._plain_forward(**kwargs)
        weights = {} if labels is None else self.exit_weights
        with self._running(ForwardPass(self._draw(kwargs), frozenset(weights))) as this:
            if labels is None:
                kwargs.setdefault("use_cache", False)
                return self._plain_forward(**{**kwargs, **self._without_balancing()})
            return self._forward_with_losses(this, kwargs, labels, weights)

    @compiled_below
    def _forward_with_losses(
        self,
        this: ForwardPass,
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
        outputs = self._plain_forward(**self._without_logits(kwargs), return_dict=True)
        distillation_weight = 0.0 if self._to_evaluate else self.recipe.distillation_weight
        losses = self._losses(this, labels, weights, num_items, distillation_weight)
        self.last = losses
        loss = losses.loss
        if this.router_logits:
            config, mask = self._anatomy.model.config, kwargs.get("attention_mask")
            balance = this.balancing_loss(mask, config.num_experts_per_tok)
            # Of several batches of a step each adds its share, as to the loss.
            share = 1.0 if num_items is None else losses.tokens / at_least_one(num_items)
            loss = loss + config.router_aux_loss_coef * share * balance.to(loss.device)
        rest = {name: value for name, value in outputs.items() if name != "loss"}
        result = type(outputs)(loss=loss, **rest)
        return result.to_tuple() if as_tuple else result

    @not_compiled
    def _losses(
        self,
        this: ForwardPass,
        labels: Tensor,
        weights: dict[int, float],
        num_items: Tensor | float | None,
        distillation_weight: float,
    ) -> ExitLosses:
        fused = None
        if self.recipe.fused_loss and not distillation_weight:
            fused = fused_loss(self._anatomy, labels.device)
        return exit_losses(
            this.states,
            labels,
            weights,
            self._anatomy.shared_exit,
            self._anatomy.exit_parameters(),
            num_items=num_items,
            distillation_weight=distillation_weight,
            chunk_tokens=self.recipe.chunk_tokens,
            vocabulary=self._anatomy.vocabulary,
            fused=fused,
        )

    @not_compiled
    def _draw(self, kwargs: dict[str, Any]) -> Tensor | None:
        rates = self.skip_rates
        micro_batch, self._micro_batch = self._micro_batch, self._micro_batch + 1
        if not any(rates):
            return None
        named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next(v for v in (*named, *kwargs.values()) if isinstance(v, Tensor))
        step = self._known_step()
        return draw_skipped_rows(
            rates, inputs.shape[0], seed=self.recipe.seed, step=step, micro_batch=micro_batch
        )

    def _without_logits(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Logits come from the exit loss; the model itself need compute those of one position.

        Named as a tensor: a number lets some models (Gemma 4) drop the other positions' states early.
        """
        if self._anatomy.has_logits_to_keep:
            kwargs = {**kwargs, "logits_to_keep": torch.tensor([-1], device="cpu")}
        return {"use_cache": False, **kwargs, **self._without_balancing()}

    def _without_balancing(self) -> dict[str, Any]:
        """The model's own load balancing loss takes every layer to have seen every row."""
        return {"output_router_logits": False} if self._anatomy.is_balanced_mixture else {}

    @contextmanager
    def _running(self, this: ForwardPass) -> Iterator[ForwardPass]:
        """States are collected while the pass runs; the draw stays for replays in backward."""
        this.others = self._pass.others
        self._pass = this
        try:
            yield this
        finally:
            self._pass = ForwardPass(this.skipped, others=this.others, is_running=False)

    @compiled_below
    def _layer_forward(
        self, number: int, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """The forward of layer `number`, from 0: its own, but for the rows that skip it."""
        # A pass that is over is kept for what is computed again in backward, and for nothing else.
        if not (self._pass.is_running or _is_in_backward()):
            return plain(*args, **kwargs)
        layer = self._anatomy.layers[number]
        return self._pass.run_layer(number, layer, plain, *args, **kwargs)

    def _note_routing(self, number: int, index: int, _: nn.Module, __: Any, output: Any) -> None:
        if self._pass.is_running:
            logits = output[index] if isinstance(output, tuple) else output
            self._pass.note_routing(number, logits)

    def _install(self) -> None:
        setattr(self._anatomy.model, HANDLE, self)
        self._plain_forward = self._replace(self._anatomy.model, self._forward)
        for number, layer in enumerate(self._anatomy.layers):
            plain = layer.__dict__.get("forward", functools.partial(_class_forward, layer))
            self._replace(layer, functools.partial(self._layer_forward, number, plain))
            if self._anatomy.is_balanced_mixture:
                for router, index in self._anatomy.routers(layer):
                    note = functools.partial(self._note_routing, number, index)
                    self._hooks.append(router.register_forward_hook(note))
        if self._anatomy.is_balanced_mixture and not self._hooks:
            self._anatomy.refuse("its routers are not found: leave output_router_logits out")

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        plain: Callable[..., Any] = module.forward
        before = module.__dict__.get("forward")

        # The signature stays: Trainer reads from it which columns and loss arguments a model takes.
        @functools.wraps(plain)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if args and args[0] is module:  # Accelerate, taking its own off, binds it like a method
                args = args[1:]
            return (forward if self._attached else plain)(*args, **kwargs)

        module.forward = replacement
        self._replaced.append((module, before, replacement))
        return plain

    def _remove(self) -> None:
        self._attached = False
        for module, before, replacement in self._replaced:
            # Something put around it since (Accelerate's autocast) stays, and finds the plain one.
            found = module.__dict__.get("forward")
            if getattr(found, "__func__", found) is replacement:
                del module.forward
                if before is not None:
                    module.forward = before
        for hook in self._hooks:
            hook.remove()
        delattr(self._anatomy.model, HANDLE)


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _class_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the layer's class at the time of the call: FSDP2 exchanges the class."""
    return type(layer).forward(layer, *args, **kwargs)


def shifted_labels(labels: Tensor | None, shift_labels: Tensor | None) -> Tensor | None:
    """Labels as transformers models take them -> the token each position predicts, int [B, T]."""
    if shift_labels is not None or labels is None:
        return shift_labels
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
