"""Put the recipe on a transformers causal LM, and take it off again.

Nothing is added to the module tree: the `forward` of the model and of each decoder layer is
replaced on the instance, so state-dict names, devices, hooks, PEFT and FSDP wrappers stay as they
are.

A recipe on a model: what replaces the forward of the model and of its layers.

The rows a layer skips are drawn once per forward pass, before any layer runs. Gradient
checkpointing wraps a layer's own forward, below the replaced one, so a replay sees the rows already
taken out.
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
from layerskip.recipe.layer_dropout import draw_skipped_rows, run_on_kept_rows, skip_layer
from layerskip.recipe.model_parts import (
    ModelParts,
    compiled_below,
    find_model_parts,
    not_compiled,
    transformers_model,
)
from layerskip.recipe.schedule import RecipeConfig, exit_weights, skip_rates


@dataclass
class ForwardPass:
    """The rows that skip each layer, and the states and routing noted while the pass runs.

    Attributes:
        skipped: bool [layers, B], True = skipped; None = no layer dropout.
        wanted: exits whose hidden states are noted.
        states: hidden states [B, T, D] that left exit E.
        router_logits: (layer, [tokens, experts]) of a mixture of experts.
        others: how many values a layer returns in a tuple behind its hidden states; None = no tuple.
        is_running: False once the pass is over; the draw stays for replays in backward, which note
            nothing.
    """

    skipped: Tensor | None
    wanted: frozenset[int] = frozenset()
    states: dict[int, Tensor] = field(default_factory=dict)
    router_logits: list[tuple[int, Tensor]] = field(default_factory=list)
    others: int | None = None
    is_running: bool = True

    @compiled_below
    def run_layer(
        self, number: int, layer: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run layer `number`, from 0, on the rows that do not skip it, and note its output."""
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        skipped = None if self.skipped is None else self.skipped[number]
        output: Any
        if skipped is None or not skipped.any():
            output = plain(hidden, *args, **kwargs)
            self.others = len(output) - 1 if isinstance(output, tuple) else None
        elif skipped.all():
            output = skip_layer(hidden, [p for p in layer.parameters() if p.requires_grad])
            output = output if self.others is None else (output, *[None] * self.others)
        else:
            output = run_on_kept_rows(plain, skipped, hidden, args, kwargs)
        if self.is_running and number + 1 in self.wanted:
            self.states[number + 1] = output[0] if isinstance(output, tuple) else output
        return output

    @not_compiled
    def note_routing(self, number: int, logits: Tensor) -> None:
        """Keep the logits [tokens, experts] with which layer `number` chose experts."""
        self.router_logits.append((number, logits))

    def balancing_loss(self, mask: Tensor | None, top_k: int) -> Tensor:
        """Load balancing loss of the experts over the tokens each layer routed, without padding.

        transformers' own, which takes every layer to have routed the whole batch only with a mask.

        Args:
            mask: int [B, T], 0 = padding; another kind of mask is taken as no padding.
            top_k: experts a token is sent to.
        """
        # Takes a while to import, and most models have no experts.
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        routed: list[Tensor] = []
        for number, logits in self.router_logits:
            chosen = logits
            if mask is not None and mask.ndim == 2:
                kept = mask if self.skipped is None else mask[~self.skipped[number].to(mask.device)]
                chosen = logits[kept.flatten() > 0]
            routed.append(chosen.float())
        over_all: Any = load_balancing_loss_func  # whose types know one layer alone
        return over_all(tuple(routed), routed[0].shape[-1], top_k)


HANDLE = "_layerskip_recipe"


class AttachedRecipe:
    """A recipe on a model. `attach` makes it; a training loop tells it the step.

    Attributes:
        recipe: the settings.
        num_layers: L of the model.
        last: losses of the latest training pass, None before the first.
    """

    def __init__(self, anatomy: ModelParts, recipe: RecipeConfig) -> None:
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
    anatomy = find_model_parts(plain_model)
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
