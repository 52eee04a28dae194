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
from transformers.trainer_utils import rotate_checkpoints

from layerskip.errors import NonFiniteLossError
from layerskip.model.hardware import disable_cudnn_attention, peak_memory_bytes
from layerskip.recipe import RecipeConfig, attach
from layerskip.recipe.exit_loss import IGNORED_LABEL, ExitLosses
from layerskip.training.callbacks import RecipeCallback, TokenRate, check_arguments, check_sharding
from layerskip.training.checkpointing import (
    INCOMPLETE,
    finish_checkpoint,
    last_checkpoint,
    last_good,
    load_renamed,
    unwritten,
)
from layerskip.training.data import LengthGroupedSampler


class ExitTotals:
    """Loss and accuracy of each exit, summed over batches on the device.

    Args:
        num_layers: L.
        device: of the sums.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        # rows: cross entropy in nats, correct tokens, labelled tokens; columns: exits 0 to L
        dtype = (
            torch.float32 if device.type == "mps" else torch.float64
        )  # Apple's GPUs have no float64
        self._sums = torch.zeros(3, num_layers + 1, dtype=dtype, device=device)

    def add(self, losses: ExitLosses) -> None:
        """Add a batch."""
        exits = list(losses.exits)
        self._sums[0, exits] += losses.loss_sums.to(self._sums.device)
        self._sums[1, exits] += losses.correct.to(self._sums.device)
        self._sums[2, exits] += losses.tokens

    def take(self, reduce: Callable[[Tensor], Tensor]) -> dict[int, tuple[float, float]]:
        """Return mean loss (nats per token) and accuracy of each exit since the last call, and reset.

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


_Trainer: Any = object  # the Trainer that the mixin is combined with, untyped


class LayerSkipMixin(_Trainer):  # type: ignore[misc]
    """Adds the recipe to a transformers Trainer, or a class derived from it such as TRL's SFTTrainer.

    `class Mine(LayerSkipMixin, SFTTrainer): ...`. The model trains with layer dropout and the
    weighted loss of its exits, normalised by the items of the accumulated batch as Trainer does.
    Each exit's loss and accuracy are logged, in evaluation too. Checkpoints appear whole or not at
    all. A loss that is not finite stops training.

    Args:
        recipe: the settings.
        eval_exits: exits to evaluate besides the last layer; None = about eight, evenly spread, and
            those that the recipe names.
        *args: the trainer's own.
        **kwargs: the trainer's own.

    Raises:
        ValueError: the recipe does not fit the model or the trainer's arguments, or one process has
            several GPUs.
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
        disable_cudnn_attention(self.args.device)  # layer dropout changes the shapes
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
        # Trainer then passes the items of the accumulated batch, by which the loss is divided.
        self.model_accepts_loss_kwargs = True
        self.add_callback(RecipeCallback(self.attached))
        self._train_totals = ExitTotals(layers, self.args.device)
        self._eval_totals = ExitTotals(layers, self.args.device)
        self._token_rate = TokenRate()
        self.add_callback(self._token_rate)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the recipe's loss in training, and that of the trainer in evaluation."""
        if not self.model.training:
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if isinstance(num_items_in_batch, Tensor):  # as a float, FSDP2 would cast it to bfloat16
            num_items_in_batch = num_items_in_batch.long()
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        losses = self.attached.last
        if losses is None:
            raise ValueError(
                "the batch has no labels, so there is no loss: give the rows labels, or a collator"
                " that makes them, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)"
            )
        self._train_totals.add(losses)
        tokens = inputs.get("input_ids")
        tokens = inputs["inputs_embeds"][..., 0] if tokens is None else tokens
        self._token_rate.add(tokens.numel())
        loss = outputs["loss"]
        # DDP averages gradients over processes, while the items are summed over them.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward; raise NonFiniteLossError before the optimizer uses such a loss."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._check_finite("loss", loss.item(), self.state.global_step + 1)
        return loss

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            raise NonFiniteLossError(
                f"the {name} is {value} at step {step}: training stopped,"
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
        """Evaluate every exit in `eval_exits`; the loss returned is the last layer's."""
        predict = super().prediction_step
        if inputs.get("labels") is None:
            return predict(model, inputs, prediction_loss_only, ignore_keys)
        prepared = self._without_repeated_rows(self._prepare_inputs(inputs))
        with self.compute_loss_context_manager():
            losses = self.attached.evaluate(self.eval_exits, prepared, model)
        self._eval_totals.add(losses)
        if not prediction_loss_only:
            return predict(model, inputs, False, ignore_keys)
        return losses.loss_sums[-1] / max(losses.tokens, 1), None, None

    def _without_repeated_rows(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Ignore the rows that fill up the last batches of several processes."""
        data = self.accelerator.gradient_state
        if self.args.world_size == 1 or not data.end_of_dataloader or data.remainder <= 0:
            return batch
        rows = len(batch["labels"])
        new_rows = min(max(data.remainder - self.args.process_index * rows, 0), rows)
        labels = batch["labels"].clone()
        labels[new_rows:] = IGNORED_LABEL
        return {**batch, "labels": labels}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Add loss and accuracy of every exit to the metrics."""
        with self._token_rate.paused():
            output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", args[4] if len(args) > 4 else "eval")
        exits = self._eval_totals.take(self._sum_over_processes)
        for exit_layer, (loss, accuracy) in exits.items():
            output.metrics[f"{prefix}_loss_exit_{exit_layer}"] = loss
            output.metrics[f"{prefix}_accuracy_exit_{exit_layer}"] = accuracy
        if last := exits.get(self.attached.num_layers):
            output.metrics[f"{prefix}_loss"] = last[0]
            output.metrics.setdefault(f"{prefix}_accuracy", last[1])  # a metric of the user stays
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the exits' losses, skip rates, speed and memory to a training log."""
        if "loss" in logs:
            if not self.args.fp16:  # its scaler skips steps whose gradient overflows
                norm = logs.get("grad_norm", 0.0)
                self._check_finite("norm of the gradient", norm, self.state.global_step)
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
        """Group rows by length with a sampler whose order survives a resume."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if getattr(self.args, "train_sampling_strategy", None) != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        has_columns = hasattr(dataset, "column_names")  # else any sequence of rows
        column = dataset["input_ids"] if has_columns else (row["input_ids"] for row in dataset)
        lengths = [len(ids) for ids in column]
        return LengthGroupedSampler(lengths, batch * self.args.world_size, seed)

    def get_train_dataloader(self) -> Any:
        """Expose the sampler to accelerate, which on resume sets its epoch.

        accelerate looks one level below the skipped batches, and several processes have a level more.
        """
        loader: Any = super().get_train_dataloader()
        batches: Any = loader.batch_sampler
        sampler = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
        if sampler is not None and not hasattr(batches, "sampler"):
            batches.sampler = sampler
        return loader

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train; weights with other names in the checkpoint are loaded too (see `load_renamed`)."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
        if checkpoint and not is_sharded:
            load_renamed(self.model, Path(checkpoint))
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if best and not is_sharded:
            load_renamed(self.model, Path(best))
        return result

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint into a folder of its own, and rename it when it is whole."""
        run = Path(self.args.output_dir)
        name, unfinished = f"checkpoint-{self.state.global_step}", run / INCOMPLETE
        is_pushed = self.args.push_to_hub
        with self._token_rate.paused():
            if self.is_world_process_zero():
                for path in unfinished.glob("checkpoint-*"):
                    if path.name != name:  # of a run that was killed
                        shutil.rmtree(path, ignore_errors=True)
            try:
                # 1. Write it. A push reads the files in the background, so it waits for the rename.
                self.args.output_dir, self.args.push_to_hub = str(unfinished), False
                super()._save_checkpoint(*args, **kwargs)
                self._set_final_best_path(unfinished / name, run / name)
                self.accelerator.wait_for_everyone()
                self.args.output_dir, self.args.push_to_hub = str(run), is_pushed
                # 2. Rename it, and remove the oldest.
                if self.args.should_save:
                    finish_checkpoint(unfinished / name, run / name)
                    best = self.state.best_model_checkpoint
                    rotate_checkpoints(str(run), self.args.save_total_limit, best)
                self.accelerator.wait_for_everyone()
                if is_pushed:
                    self._push_from_checkpoint(str(run / name))
            except Exception as error:  # the tokenizers library raises Exception for a full disk
                shutil.rmtree(unfinished, ignore_errors=True)
                step = self.state.global_step
                raise unwritten(f"the checkpoint of step {step}", run, error) from error
            finally:
                self.args.output_dir, self.args.push_to_hub = str(run), is_pushed

    def _set_final_best_path(self, unfinished: Path, final: Path) -> None:
        state = self.state
        if state.best_model_checkpoint == str(unfinished):
            state.best_model_checkpoint = str(final)
            if self.args.should_save:
                state.save_to_json(str(unfinished / TRAINER_STATE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the checkpoint's state, but keep the present learning rate and weight decay."""
        present = [
            {name: group[name] for name in ("initial_lr", "weight_decay") if name in group}
            for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        if not isinstance(self.lr_scheduler, LambdaLR):  # other schedules do not scale a peak
            return
        for group, settings in zip(self.optimizer.param_groups, present, strict=True):
            if settings["initial_lr"] != group["initial_lr"]:
                group["lr"] *= settings["initial_lr"] / group["initial_lr"]
            group.update(settings)
        self.lr_scheduler.base_lrs = [settings["initial_lr"] for settings in present]
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class LayerSkipTrainer(LayerSkipMixin, Trainer):  # type: ignore[misc]
    """A transformers Trainer that trains with the recipe; see `LayerSkipMixin`."""
