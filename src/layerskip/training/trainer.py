"""A transformers Trainer with the recipe, and a mixin that gives it to other trainers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from layerskip.errors import NonFiniteLossError
from layerskip.model.hardware import leave_out_cudnn_attention, peak_memory_bytes
from layerskip.recipe import RecipeConfig, attach
from layerskip.recipe.exit_loss import IGNORED_LABEL, ExitLosses
from layerskip.training.callbacks import (
    RecipeCallback,
    TokenRate,
    check_arguments,
    check_sharding,
)
from layerskip.training.checkpointing import (
    INCOMPLETE,
    last_good,
    load_renamed,
    move_when_whole,
    remove_old_checkpoints,
    unwritten,
)
from layerskip.training.data import LengthGroupedSampler


class ExitTotals:
    """Sums over batches, on the device: which exits have a loss changes from step to step.

    Args:
        num_layers: L.
        device: where the sums are kept.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        # rows: cross entropy in nats, correct tokens, labelled tokens; columns: exits 0 to L
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        self._sums = torch.zeros(3, num_layers + 1, dtype=dtype, device=device)

    def add(self, losses: ExitLosses) -> None:
        """Add a batch."""
        exits = list(losses.exits)
        self._sums[0, exits] += losses.loss_sums.to(self._sums.device)
        self._sums[1, exits] += losses.correct.to(self._sums.device)
        self._sums[2, exits] += losses.tokens

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[int, tuple[float, float]]:
        """Mean loss (nats a token) and accuracy of each exit since the last call; starts anew.

        Args:
            reduce: sums a tensor over the processes.
        """
        sums = reduce(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        return {
            exit_layer: (loss / tokens, correct / tokens)
            for exit_layer, (loss, correct, tokens) in enumerate(zip(*sums, strict=True))
            if tokens
        }


_Trainer: Any = object  # stands for the Trainer below the mixin, whose attributes are untyped


class LayerSkipMixin(_Trainer):  # type: ignore[misc]
    """Gives a transformers Trainer, or a class derived from it such as TRL's SFTTrainer, the recipe.

    `class Mine(LayerSkipMixin, SFTTrainer): ...`. The model trains with layer dropout and the
    weighted loss of its exits, normalised by the items of the accumulated batch as Trainer does.
    Each exit's loss and accuracy are logged, in evaluation too. Checkpoints appear whole or not at
    all. A loss that is not finite stops training.

    Args:
        recipe: the settings.
        eval_exits: exits looked at in evaluation, beside the last layer; None = about eight, evenly
            spread, and those that the recipe names.
        args, kwargs: the trainer's own.

    Raises:
        ValueError: where the recipe does not fit the model, another loss is asked for, or several GPUs
            are used from one process.
    """

    def __init__(
        self,
        *args: Any,
        recipe: RecipeConfig,
        eval_exits: Iterable[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_arguments(self.args)
        check_sharding(self)
        leave_out_cudnn_attention(self.args.device)  # rows that skip layers change the shapes
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError(
                "the recipe computes its own loss: compute_loss_func would have no effect; leave it out"
            )
        if getattr(self, "model_init", None) is not None:
            raise ValueError(
                "model_init would make a model without the recipe; give the model itself"
            )
        self.attached = attach(self.model, recipe)
        layers = self.attached.num_layers
        if eval_exits is None:
            spread = range(step := max(1, round(layers / 8)), layers, step)
            eval_exits = {*spread, *recipe.fixed_exits, *(recipe.exits or ())}
        self.eval_exits = tuple(sorted(eval_exits))
        if outside := [e for e in self.eval_exits if not 1 <= e <= layers]:
            raise ValueError(f"eval_exits names {outside}; an exit is 1 to {layers}")
        # The loss is divided by the items given to it, whatever the class below does with its own.
        self.model_accepts_loss_kwargs = True
        self.add_callback(RecipeCallback(self.attached))
        self._train_totals = ExitTotals(layers, self.args.device)
        self._eval_totals = ExitTotals(layers, self.args.device)
        self._output_dir: str | None = None
        self._is_to_be_pushed = False
        self._token_rate = TokenRate()
        self.add_callback(self._token_rate)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """In training the recipe's loss; in evaluation whatever the class below computes."""
        if not self.model.training:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if isinstance(num_items_in_batch, Tensor):  # FSDP2 would round it to 16 bits as a float
            num_items_in_batch = num_items_in_batch.long()
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        losses = self.attached.last
        if losses is None:
            raise ValueError(
                "the batch has no labels, so there is no loss: give the rows labels, or a collator"
                " that makes them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        self._train_totals.add(losses)
        given = inputs.get("input_ids")
        given = inputs["inputs_embeds"][..., 0] if given is None else given
        self._token_rate.add(given.numel())
        loss = outputs["loss"]
        # DDP averages gradients over processes, while the items are those of all of them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One forward and backward; raises NonFiniteLossError before a step is taken with it."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._must_be_finite("the loss", loss.item())
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own; a gradient that is not finite is no step either, though the loss was."""
        norm = super()._get_grad_norm(*args, **kwargs)
        accelerator = self.accelerator
        # With float16 there is a scaler, which leaves such steps out; DeepSpeed has its own.
        is_scaled = accelerator.scaler is not None or accelerator.distributed_type == "DEEPSPEED"
        if norm is not None and not is_scaled:
            self._must_be_finite("the norm of the gradient", float(norm))
        return norm

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The class's own, and then what it leaves out: weights under other names in the checkpoint."""
        super()._load_from_checkpoint(resume_from_checkpoint, model=model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_renamed(model or self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """The same for the best checkpoint, at the end."""
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_renamed(self.model, Path(self.state.best_model_checkpoint))

    def _must_be_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            step = self.state.global_step + 1
            raise NonFiniteLossError(
                f"{what} is {value} at step {step}; training stopped before it was used,"
                f" {last_good(self.args.output_dir, step)}. A lower learning rate, warm-up"
                " steps or bfloat16 instead of float16 may help"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Loss and accuracy of every exit in `eval_exits`; the loss returned is the last layer's."""
        plain = super().prediction_step
        if inputs.get("labels") is None:
            return plain(model, inputs, prediction_loss_only, ignore_keys)
        prepared = self._without_repeated_rows(self._prepare_inputs(inputs))
        with self.compute_loss_context_manager():
            losses = self.attached.evaluate(self.eval_exits, prepared, model)
        self._eval_totals.add(losses)
        if not prediction_loss_only:
            return plain(model, inputs, False, ignore_keys)
        return losses.loss_sums[-1] / max(losses.tokens, 1), None, None

    def _without_repeated_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Of several processes' last batches, which are filled up from the beginning, the new rows."""
        data = self.accelerator.gradient_state
        if self.args.world_size == 1 or not data.end_of_dataloader or data.remainder <= 0:
            return batch
        rows = len(batch["labels"])
        own = min(max(data.remainder - self.args.process_index * rows, 0), rows)
        labels = batch["labels"].clone()
        labels[own:] = IGNORED_LABEL
        return {**batch, "labels": labels}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own, with loss and accuracy of every exit among the metrics."""
        with self._token_rate.paused():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        exits = self._eval_totals.take(self._sum_over_processes)
        for exit_layer, (loss, accuracy) in exits.items():
            output.metrics[f"{prefix}_loss_exit_{exit_layer}"] = loss
            output.metrics[f"{prefix}_accuracy_exit_{exit_layer}"] = accuracy
        if last := exits.get(self.attached.num_layers):
            output.metrics[f"{prefix}_loss"] = last[0]
            output.metrics.setdefault(f"{prefix}_accuracy", last[1])  # unless it is the user's own
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the exits' figures, dropout rate, speed and memory to a training log."""
        if "loss" in logs:
            for exit_layer, (loss, accuracy) in self._train_totals.take(
                self._sum_over_processes
            ).items():
                logs[f"loss_exit_{exit_layer}"] = loss
                logs[f"accuracy_exit_{exit_layer}"] = accuracy
            logs["tokens_per_s"] = self._token_rate.take(self._sum_over_processes, self.args.device)
            logs["skip_rate_mean"] = sum(self.attached.skip_rates) / self.attached.num_layers
            logs["skip_rate_last"] = self.attached.skip_rates[-1]
            logs["peak_memory_bytes"] = peak_memory_bytes(self.args.device)
        super().log(logs, *args, **kwargs)

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values.clone(), reduction="sum")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Batches grouped by length are the same after a resume, in any epoch."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if getattr(self.args, "train_sampling_strategy", None) != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        of_datasets = hasattr(dataset, "column_names")  # else any sequence of rows
        column = dataset["input_ids"] if of_datasets else (row["input_ids"] for row in dataset)
        lengths = [len(ids) for ids in column]
        return LengthGroupedSampler(lengths, batch * self.args.world_size, seed)

    def get_train_dataloader(self) -> Any:
        """The class's own; after a resume its sampler is told the epoch in several processes too.

        accelerate looks for it behind the batches that are skipped, one level deep, where several
        processes have one level more.
        """
        loader: Any = super().get_train_dataloader()
        batches: Any = loader.batch_sampler
        sampler = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
        if sampler is not None and not hasattr(batches, "sampler"):
            batches.sampler = sampler
        return loader

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        directory: str = super()._get_output_dir(*args, **kwargs)
        return self._output_dir or directory

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint beside the others and move it there when it is whole."""
        with self._token_rate.paused():
            # Before the new one is there: what its weights are worth the next steps will show.
            self._remove_old_checkpoints()
            self._write_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own; checkpoints that are one too many until then are removed at the end."""
        result = super().train(*args, **kwargs)
        self._remove_old_checkpoints()
        return result

    def _remove_old_checkpoints(self) -> None:
        limit, state = self.args.save_total_limit, self.state
        if self.args.should_save and limit is not None and limit > 0:
            remove_old_checkpoints(
                self.args.output_dir, limit, state.global_step, state.best_model_checkpoint
            )

    def _write_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        run = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        unfinished = run / INCOMPLETE
        self._output_dir = str(unfinished)
        if self.is_world_process_zero():
            for path in unfinished.glob("checkpoint-*"):
                if path.name != name:  # of a run that was killed
                    shutil.rmtree(path, ignore_errors=True)
        try:
            super()._save_checkpoint(*args, **kwargs)
            self._name_the_best_as_it_will_be(unfinished / name, run / name)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                move_when_whole(unfinished / name, run / name)
            if self._is_to_be_pushed:
                super()._push_from_checkpoint(str(run / name))
        except Exception as error:  # tokenizers has no class of its own for a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            raise unwritten(
                f"the checkpoint of step {self.state.global_step}", run, error
            ) from error
        finally:
            self._output_dir, self._is_to_be_pushed = None, False

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not before the checkpoint has its place: what is pushed is read in the background."""
        self._is_to_be_pushed = True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The checkpoint's state, with the learning rate and weight decay that are asked for now."""
        asked = [
            {name: group[name] for name in ("initial_lr", "weight_decay") if name in group}
            for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        if not isinstance(self.lr_scheduler, LambdaLR):  # others have no factor of the peak
            return
        for group, settings in zip(self.optimizer.param_groups, asked, strict=True):
            if settings["initial_lr"] != group["initial_lr"]:
                group["lr"] *= settings["initial_lr"] / group["initial_lr"]
            group.update(settings)
        self.lr_scheduler.base_lrs = [settings["initial_lr"] for settings in asked]
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _name_the_best_as_it_will_be(self, unfinished: Path, final: Path) -> None:
        state = self.state
        if state.best_model_checkpoint != str(unfinished):
            return
        state.best_model_checkpoint = str(final)
        if self.args.should_save:
            state.save_to_json(str(unfinished / TRAINER_STATE_NAME))


class LayerSkipTrainer(LayerSkipMixin, Trainer):  # type: ignore[misc]
    """A transformers Trainer that trains with the recipe; see `LayerSkipMixin`."""
