"""The callback that tells a recipe the training step, and what it refuses of a Trainer."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from layerskip.recipe.attached import AttachedRecipe

_PATIENCE = 10  # steps without a label, at the beginning


class RecipeCallback(TrainerCallback):
    """Tells an attached recipe the training step; for a plain Trainer whose model has one.

    Args:
        attached: what `attach` returned.
    """

    def __init__(self, attached: AttachedRecipe) -> None:
        self._attached = attached
        self._unlabelled: int | None = 0  # steps so far; None once there was a label
        self._labels = 0  # of the step's batches before the last

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse what takes the recipe off the model, silently."""
        self._unlabelled = 0
        if getattr(args, "use_liger_kernel", False):
            raise ValueError(
                "use_liger_kernel puts another forward over the recipe's, which then does nothing; "
                "leave it out: the recipe takes Liger's loss itself where it is installed"
            )
        check_arguments(args)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the first batch of an optimizer step."""
        self._attached.set_step(state.global_step, state.max_steps)
        self._attached.last = None
        self._labels = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After each batch of an optimizer step but the last."""
        self._labels += self._attached.last.tokens if self._attached.last else 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a step that came about without the exits' loss, and training without labels."""
        if self._attached.last is None:
            raise ValueError(
                "the model was called without labels, so the recipe had no loss: leave out what "
                "computes another, such as compute_loss_func, and give a trainer that computes its own "
                "(TRL's) LayerSkipMixin"
            )
        if self._unlabelled is None:
            return
        labels = self._labels + self._attached.last.tokens
        self._unlabelled = None if labels else self._unlabelled + 1
        if self._unlabelled == min(_PATIENCE, state.max_steps):
            raise ValueError(
                f"no row of the first {self._unlabelled} steps had a label to learn (all are -100): are"
                " prompts longer than the rows are cut, or is there no completion?"
            )


def check_gpus(count: int) -> None:
    """Raise ValueError where a Trainer would drive several GPUs in one process."""
    if count > 1:
        raise ValueError(
            f"{count} GPUs in one process are not supported: start with "
            "`torchrun` or `accelerate launch`, or choose one with CUDA_VISIBLE_DEVICES"
        )


def check_arguments(args: Any) -> None:
    """Raise ValueError where a Trainer's arguments take the labels or the forward from the model."""
    check_gpus(args.n_gpu)
    if not math.isfinite(args.learning_rate):
        raise ValueError(f"learning_rate is {args.learning_rate}; it must be a number")
    metric = getattr(args, "metric_for_best_model", None) or ""
    if "loss_exit_" in metric and args.greater_is_better:
        raise ValueError(
            f"the best {metric} is the lowest, but transformers takes it for the highest: set "
            "greater_is_better=False"
        )
    if args.label_smoothing_factor or getattr(args, "loss_type", None) not in (None, "nll"):
        raise ValueError(
            "the recipe computes its own loss: leave out label_smoothing_factor, and set TRL's"
            ' loss_type, whose default is another one in some versions, to "nll"'
        )
    if getattr(args, "activation_offloading", False):
        raise ValueError(
            "activation_offloading waits for a backward pass that the exits' loss does not make: leave"
            " it out, gradient checkpointing saves memory too"
        )
    deepspeed = getattr(args, "deepspeed_plugin", None)
    if getattr(deepspeed, "zero_stage", 0) == 3:
        raise ValueError(
            "DeepSpeed ZeRO stage 3 leaves no whole weights to the early exit loss: take stage 2"
        )


def check_sharding(trainer: Any) -> None:
    """Raise ValueError where devices divide weights in a way that the exits' loss cannot have."""
    state = trainer.accelerator.state
    fsdp, parallel = getattr(state, "fsdp_plugin", None), trainer.args.parallelism_config
    sizes = [getattr(parallel, f"{kind}_size", 1) for kind in ("tp", "cp", "sp")]
    if max(*sizes, trainer.get_tp_size()) > 1:
        raise ValueError(
            "tensor, context and sequence parallelism divide what the exits' loss needs whole: divide"
            " the data alone (DDP) or the weights too (FSDP2)"
        )
    if getattr(getattr(state, "dynamo_plugin", None), "use_regional_compilation", False):
        raise ValueError(
            "regional compilation runs a copy of the model that has no recipe: leave it out,"
            " torch_compile compiles the layers"
        )
    if trainer.is_fsdp_enabled and getattr(fsdp, "fsdp_version", 2) == 1:
        raise ValueError(
            "FSDP version 1 leaves no whole weights to the early exit loss: set fsdp_version: 2"
        )
    if trainer.args.fp16 and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "the early exit loss takes its gradients before they are scaled, which float16 without"
            " autocast cannot hold: use bfloat16 with FSDP2 and DeepSpeed"
        )
