"""`train(config)`: a checkpoint and rows of text in, a checkpoint that exits early out."""

from __future__ import annotations

import importlib.util
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import align_special_tokens

from layerskip.recipe import RecipeConfig, attach, detach
from layerskip.recipe.schedule import enabled_exits
from layerskip.training.callbacks import Board, JsonLinesLog, TimeBudget, read_log, time_spent
from layerskip.training.checkpoints import INCOMPLETE, unwritten
from layerskip.training.checks import (
    check_installed,
    check_layers,
    check_packages,
    warn_of_long_warmup,
    warn_of_no_decoder,
)
from layerskip.training.config import TrainConfig
from layerskip.training.data import Collator
from layerskip.training.device import arithmetic, uses_gpu
from layerskip.training.errors import TrainingWarning
from layerskip.training.folder import LOG, alone_in, keep_settings, where_to_begin
from layerskip.training.loading import (
    add_end_of_turn,
    check_packing,
    check_positions,
    check_tokens,
    load_model,
    load_tokenizer,
    one_line,
    with_adapter,
)
from layerskip.training.memory import keep_freed_memory
from layerskip.training.plots import plot_run
from layerskip.training.progress import Progress, Watch
from layerskip.training.result import save_result, transformers_can_exit
from layerskip.training.room import warn_of_little_room
from layerskip.training.rows import hidden_bars
from layerskip.training.run_rows import encoding_of, find_rows, load_rows
from layerskip.training.trainer import LayerSkipTrainer


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        output: folder of the checkpoint.
        steps: optimizer steps done.
        metrics: figures of the last evaluation, and those of training.
        exit_layer: exit written into the checkpoint.
    """

    output: Path
    steps: int
    metrics: dict[str, float]
    exit_layer: int


def train(config: TrainConfig, watch: Callable[[Progress], None] | None = None) -> TrainResult:
    """Train a model with the recipe and write an ordinary transformers checkpoint.

    The folder `config.output` gets the model (a LoRA adapter merged, and beside it in `adapter/`),
    tokenizer, `train.json` (all settings), `train_log.jsonl`, pictures and `checkpoint-*` to resume
    from. Under `torchrun` or `accelerate launch` all processes call this. Nothing is printed.

    Args:
        config: the settings.
        watch: is told how far the run is, in the first process.

    Raises:
        ImportError: a package is missing.
        ValueError: for settings that do not fit each other, the data or the model: before training.
        NonFiniteLossError, UnwrittenCheckpointError: what stopped training; checkpoints are kept.
    """
    check_packages()
    output = Path(config.output)
    with hidden_bars(), alone_in(output):
        return _train(config, output, watch)


def _train(
    config: TrainConfig, output: Path, watch: Callable[[Progress], None] | None
) -> TrainResult:
    resume_from = where_to_begin(config, output)
    set_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    check_installed(config)
    tokenizer = load_tokenizer(config)
    exit_layer = check_layers(config)
    encoding = encoding_of(config, tokenizer)
    sources = find_rows(config, encoding)
    model = load_model(config)
    # Whatever may not fit the model is tried before the rows take long.
    attach(model, config.effective_recipe)
    detach(model)
    can_exit = transformers_can_exit(model, exit_layer)
    if config.packing:
        check_packing(model)
    if config.lora_rank is not None:
        model = with_adapter(model, config)
    train_rows, eval_rows = load_rows(config, encoding, *sources)
    check_tokens(model, tokenizer.pad_token_id or 0, train_rows, eval_rows)
    check_positions(model, train_rows, eval_rows)
    if not can_exit:
        warn_of_no_decoder(model.config.model_type)
    # Trainer does both where it trains; where a run goes on that has ended already, it does not.
    align_special_tokens(model, tokenizer)
    add_end_of_turn(model, tokenizer, train_rows)
    use_cache = model.config.use_cache
    trainer = _trainer(config, model, tokenizer, train_rows, eval_rows, exit_layer)
    trainer.add_callback(JsonLinesLog(output / LOG, trainer.attached))
    if importlib.util.find_spec("tensorboard") is not None:
        trainer.add_callback(Board())
    if watch is not None:
        trainer.add_callback(Watch(watch))
    if trainer.is_world_process_zero():
        shutil.rmtree(output / INCOMPLETE, ignore_errors=True)
        warn_of_little_room(model, output, config.keep_checkpoints)
        keep_settings(config, output, train_rows, eval_rows, resumes=resume_from is not None)
    metrics = _run(trainer, config, resume_from)
    _warn_of_no_loss(trainer, config.effective_recipe, exit_layer)
    if eval_rows:
        metrics |= _evaluation(trainer)
    detach(model)
    model.config.use_cache = use_cache  # which Trainer turned off
    _write(trainer, config, exit_layer, output, can_exit)
    return TrainResult(output, trainer.state.global_step, metrics, exit_layer)


def _write(
    trainer: LayerSkipTrainer,
    config: TrainConfig,
    exit_layer: int,
    output: Path,
    can_exit: bool,
) -> None:
    """Write the result, then pictures: where those cannot be written, a warning says so."""
    try:
        save_result(trainer, config, exit_layer, output, can_exit)
    except Exception as error:  # tokenizers has no class of its own for a full disk
        shutil.rmtree(output / INCOMPLETE, ignore_errors=True)
        raise unwritten(f"the result of step {trainer.state.global_step}", output, error) from error
    if trainer.is_world_process_zero():
        try:
            plot_run(read_log(output / LOG), output)
        except OSError as error:
            what = one_line("the result is whole, but its pictures could not be written", error)
            warnings.warn(what, TrainingWarning, stacklevel=2)


def _run(trainer: LayerSkipTrainer, config: TrainConfig, resume_from: str | None) -> dict[str, Any]:
    """Train, unless the checkpoint is that of the last step: Trainer would take one more.

    The last is also the step at which the time was over.
    """
    rows: Any = trainer.train_dataset
    epoch = -(-len(rows) // (config.batch_size * config.accumulation * trainer.args.world_size))
    wanted = config.max_steps or math.ceil(config.effective_epochs * epoch)
    warn_of_long_warmup(config.warmup_steps, wanted)
    if resume_from is not None:
        state = TrainerState.load_from_json(str(Path(resume_from) / TRAINER_STATE_NAME))
        is_over = config.max_minutes is not None and time_spent(state) >= 60 * config.max_minutes
        if is_over or state.global_step >= wanted:
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise ValueError(
                    f"{resume_from} is that of the last step: go on with --resume on one device and"
                    " without FSDP or DeepSpeed, which have nothing to prepare here"
                )
            trainer._load_from_checkpoint(resume_from)
            trainer.state.global_step = state.global_step
            return {}
    return dict(trainer.train(resume_from_checkpoint=resume_from).metrics)


def _warn_of_no_loss(trainer: LayerSkipTrainer, recipe: RecipeConfig, exit_layer: int) -> None:
    """Where the time was over before the gradual curriculum came to the exit that is to draft."""
    state, layers = trainer.state, trainer.attached.num_layers
    if recipe.curriculum != "gradual" or exit_layer not in recipe.candidates(layers):
        return
    if recipe.variant == "LD" or not 0 < state.global_step < state.max_steps:
        return
    if exit_layer not in enabled_exits(recipe, layers, state.global_step - 1, state.max_steps):
        warnings.warn(
            f"training ended at step {state.global_step} of {state.max_steps}, before exit {exit_layer}"
            " had a loss: name it in fixed_exits, or set max_steps to what the time is enough for",
            TrainingWarning,
            stacklevel=2,
        )


def _evaluation(trainer: LayerSkipTrainer) -> dict[str, Any]:
    """Figures after the last step; with `eval_steps` Trainer has them already."""
    for log in reversed(trainer.state.log_history):
        if "eval_loss" in log and log["step"] == trainer.state.global_step:
            return {name: value for name, value in log.items() if name.startswith("eval_")}
    return dict(trainer.evaluate())


def _trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    train_rows: Any,
    eval_rows: Any,
    exit_layer: int,
) -> LayerSkipTrainer:
    use_gpu = uses_gpu(config)
    # Newer versions of transformers have another name for it.
    names = {field.name for field in fields(TrainingArguments)}
    name = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in names)
    checkpointing: dict[str, Any] = {name: True} if config.gradient_checkpointing else {}
    warms_up_to_constant = config.scheduler == "constant" and config.warmup_steps > 0
    arguments = TrainingArguments(
        output_dir=config.output,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.effective_epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.effective_learning_rate,
        lr_scheduler_type="constant_with_warmup" if warms_up_to_constant else config.scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=arithmetic(config) == torch.bfloat16,
        fp16=arithmetic(config) == torch.float16,
        torch_compile=config.compile,
        eval_strategy="steps" if config.eval_steps and eval_rows is not None else "no",
        eval_steps=config.eval_steps,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,
        save_steps=config.save_steps,
        save_total_limit=config.keep_checkpoints,
        report_to=[],
        prediction_loss_only=True,
        train_sampling_strategy="random" if config.packing else "group_by_length",
        remove_unused_columns=False,
        seed=config.seed,
        use_cpu=not use_gpu,
        dataloader_pin_memory=use_gpu,
        disable_tqdm=True,
        **checkpointing,
    )
    trainer = LayerSkipTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(tokenizer.pad_token_id or 0),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        recipe=config.effective_recipe,
        eval_exits=config.eval_exits,
    )
    if config.eval_exits is None:  # the one that will draft is looked at in any case
        trainer.eval_exits = tuple(sorted({*trainer.eval_exits, exit_layer}))
    trainer.remove_callback(PrinterCallback)  # prints to stdout where there is no progress bar
    if config.max_minutes is not None:
        trainer.add_callback(TimeBudget(config.max_minutes))
    return trainer
