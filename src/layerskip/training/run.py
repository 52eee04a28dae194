"""`train(config)`: a checkpoint and rows of text in, a checkpoint that exits early out."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from transformers import SchedulerType, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import align_special_tokens

from layerskip.data.readers import Row, hidden_bars, local_files, read_rows
from layerskip.errors import TrainingWarning
from layerskip.figures import plot_run
from layerskip.fileio import flush, read_json, share_weights, write_json
from layerskip.model import checkpoint as settings
from layerskip.model import tokenizer as older_names
from layerskip.model.checkpoint import recorded
from layerskip.model.datastore import most_repeated
from layerskip.model.families import FAMILIES
from layerskip.model.hardware import keep_freed_memory
from layerskip.recipe import RecipeConfig, attach, detach
from layerskip.recipe.model_parts import find_model_parts
from layerskip.recipe.schedule import enabled_exits
from layerskip.training.callbacks import (
    JsonLinesLog,
    OptionalTensorBoard,
    Progress,
    ProgressCallback,
    TimeBudget,
    check_gpus,
    read_log,
    time_spent,
)
from layerskip.training.checkpointing import (
    INCOMPLETE,
    LOG,
    keep_settings,
    lock_output_dir,
    unwritten,
    warn_low_disk_space,
    where_to_begin,
)
from layerskip.training.config import TrainConfig
from layerskip.training.data import Collator, Encoding, encode_rows, pack_rows
from layerskip.training.loading import (
    add_end_of_turn,
    arithmetic,
    check_packing,
    check_positions,
    check_tokens,
    draft_vocabulary,
    labels_of,
    load_model,
    load_tokenizer,
    merged,
    model_config,
    one_line,
    uses_gpu,
    with_adapter,
)
from layerskip.training.trainer import LayerSkipTrainer

_OTHER_SCHEDULERS = (  # with settings of their own and without a default, or led by evaluations
    "warmup_stable_decay",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "reduce_lr_on_plateau",
    "greedy",
)


def check_packages() -> None:
    """Raise ImportError where a package is missing that every run needs."""
    for name in ("accelerate", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"training needs {name}; run: pip install 'layerskip[train]'")


def check_installed(config: TrainConfig) -> None:
    """Raise ValueError where a schedule, a package or a GPU that the settings name is not there."""
    known = [kind.value for kind in SchedulerType if kind.value not in _OTHER_SCHEDULERS]
    if config.scheduler not in known:
        raise ValueError(
            f"there is no scheduler {config.scheduler!r}; there are: {', '.join(known)}"
        )
    if config.device == "cuda" and not uses_gpu(config):
        raise ValueError("the device cuda is not available here; use auto or cpu")
    if uses_gpu(config) and "LOCAL_RANK" not in os.environ:
        check_gpus(torch.cuda.device_count())
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"  # as Accelerate tells its processes
    if uses_fsdp and config.lora_rank is not None:
        raise ValueError("lora_rank needs whole weights, which FSDP divides: use it with DDP")
    if config.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank needs `peft`: pip install 'layerskip[train]'")
    if config.precision == "float16" and not uses_gpu(config):
        raise ValueError("precision float16 needs a GPU; take bfloat16, float32 or auto")


def warn_of_no_decoder(model_type: str) -> None:
    """Warn where nothing can draft with the result: neither transformers nor layerskip."""
    if model_type not in FAMILIES:
        warnings.warn(
            f"nothing will draft with the result: transformers runs all layers of {model_type}, and"
            " layerskip's decoder does not know it",
            TrainingWarning,
            stacklevel=2,
        )


def warn_of_long_warmup(warmup_steps: int, steps: int) -> None:
    """Warn where the run is over before the learning rate has come to its peak."""
    if warmup_steps >= steps:
        warnings.warn(
            f"warmup_steps is {warmup_steps}, but there are {steps} steps: the learning rate does not"
            " come to its peak",
            TrainingWarning,
            stacklevel=2,
        )


def check_layers(config: TrainConfig) -> int:
    """Compare exits with the model's layers; the exit for decoding.

    That is the one given, the first that always has a loss, or of those with a loss the nearest to L/4.

    Raises:
        ValueError: where the model has no such layers, or the exit for decoding has no loss though
            others have.
    """
    text_config = model_config(config.model).get_text_config()
    num_layers = getattr(text_config, "num_hidden_layers", None)
    if num_layers is None:
        raise ValueError(f"the model {config.model} does not say how many layers it has")
    recipe = config.effective_recipe
    recipe.check_layers(num_layers)
    if outside := [e for e in config.eval_exits or () if not 1 <= e <= num_layers]:
        raise ValueError(f"eval_exits names {outside}; an exit is 1 to {num_layers}")
    early = recipe.exits_with_loss(num_layers)
    always = [e for e in early if e in recipe.fixed_exits]
    quarter = max(1, round(num_layers / 4))
    nearest = min(early or [quarter], key=lambda e: (abs(e - quarter), e))
    chosen: int = config.exit_layer or (always[0] if always else nearest)
    if not 1 <= chosen < max(num_layers, 2):
        raise ValueError(f"exit_layer is {chosen}; it must be 1 to {num_layers - 1}")
    if early and chosen not in early:  # a run without any is a control, to be measured at that exit
        raise ValueError(
            f"exit_layer is {chosen}, but the exits that have a loss are "
            f"{', '.join(map(str, early))}: name it in fixed_exits or exits too"
        )
    return chosen


def encoding_of(config: TrainConfig, tokenizer: Any) -> Encoding:
    """How rows of a run are encoded."""
    return Encoding(
        tokenizer=tokenizer,
        prompt=config.prompt,
        completion=config.completion,
        text_field=config.text_field,
        completion_only=config.completion_only,
        max_length=config.max_length,
    )


def first_checked(
    read: Callable[[], Iterator[Row]], encoding: Encoding, source: str
) -> Iterator[Row]:
    """The rows; raises ValueError where there is none or the first is bad, before any long work.

    A file is opened again when its rows are wanted, so that none stays open if they never are.
    """
    files, rows = local_files(source), read()
    is_read_again = bool(files) and all(map(os.path.isfile, files))  # which a pipe cannot be
    closed: Any = contextlib.closing(cast(Any, rows)) if is_read_again else contextlib.nullcontext()
    with closed:
        first = next(rows, None)
        if first is None:
            raise ValueError(f"{source} has no rows")
        encoding(*first)
    return read() if is_read_again else itertools.chain([first], rows)


def find_rows(
    config: TrainConfig, encoding: Encoding
) -> tuple[Iterator[Row], Iterator[Row] | None]:
    """Rows to train on, and to evaluate on where those have a source of their own.

    Raises:
        ValueError: a source is not there or has no rows, or its first one is bad.
    """
    for name, is_given, source in (
        ("data_config", config.data_config is not None, config.data),
        ("split", config.split != "train", config.data),
        ("eval_split", config.eval_split is not None, config.eval_data),
    ):
        if is_given and source is not None and local_files(source):
            raise ValueError(f"{name} is for data sets of the hub; {source} is a file")
    read = functools.partial(
        read_rows, config.data, config.split, config.data_config, config.text_field
    )
    rows = first_checked(read, encoding, config.data)
    if config.eval_data is None:
        return rows, None
    trained_on = {os.path.realpath(file) for file in local_files(config.data)}
    for file in local_files(config.eval_data):
        if os.path.realpath(file) in trained_on:
            raise ValueError(f"{file} of eval_data is trained on; give other rows, or eval_rows")
    split = config.eval_split or config.split
    part = config.data_config if config.eval_data == config.data else None
    read = functools.partial(read_rows, config.eval_data, split, part, config.text_field)
    return rows, first_checked(read, encoding, config.eval_data)


def load_rows(
    config: TrainConfig,
    encoding: Encoding,
    train_rows: Iterator[Row],
    eval_rows: Iterator[Row] | None,
) -> tuple[Any, Any]:
    """Encoded rows to train on, and to evaluate on or None."""
    held_out: list[dict[str, list[int]]] = []
    if eval_rows is not None:  # the fewer, whose faults are found soon
        assert config.eval_data is not None
        held_out = encode_rows(eval_rows, encoding, config.eval_data, to_pack=config.packing)
    rows = encode_rows(train_rows, encoding, config.data, to_pack=config.packing)
    if eval_rows is None and config.eval_rows:
        if config.eval_rows >= len(rows):
            raise ValueError(f"eval_rows is {config.eval_rows}, but there are {len(rows)} rows")
        random.Random(config.seed).shuffle(rows)
        rows, held_out = rows[config.eval_rows :], rows[: config.eval_rows]
    if config.packing:
        rows = pack_rows(rows, config.max_length)
        held_out = pack_rows(held_out, config.max_length)
    return _dataset(rows), _dataset(held_out) if held_out else None


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows)


def save_result(
    trainer: LayerSkipTrainer,
    config: TrainConfig,
    exit_layer: int,
    output: Path,
    can_exit: bool,
) -> None:
    """Write the result beside its place and move it there, so that no half of it is ever found.

    Args:
        trainer: whose training is over.
        config: the settings.
        exit_layer: that drafts, for those who load it.
        output: the folder.
        can_exit: whether transformers drafts with this model (`transformers_can_exit`).
    """
    unfinished = output / INCOMPLETE
    if config.lora_rank is not None:
        trainer.save_model(str(unfinished / "adapter"))
        model = merged(trainer.accelerator.unwrap_model(trainer.model))
        if trainer.is_world_process_zero():
            model.save_pretrained(unfinished)
    else:
        if trainer.is_fsdp_enabled:  # else weights in parts, Accelerate's default, are not written
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(unfinished))
        model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_world_process_zero():
        return
    if not any(unfinished.glob("*.safetensors")):
        raise OSError("the Trainer wrote no weights")
    if model.generation_config is not None:
        # Plain transformers reads it; it is not among the checked fields of every version.
        model.generation_config.num_assistant_tokens = config.draft_tokens
        # By this mark transformers skips, when it reads the file, what it has no field of its own for.
        model.generation_config._from_model_config = False
        own = _own_settings(model, trainer, config)
        # In transformers' own field, unless that would fail by it; then among what is ours.
        model.generation_config.assistant_early_exit = exit_layer if can_exit else None
        if not can_exit:
            own[settings.EXIT] = exit_layer
        setattr(model.generation_config, settings.KEY, own)
        model.generation_config.save_pretrained(unfinished)
    tokenizer: Any = trainer.processing_class
    tokenizer.save_pretrained(unfinished)
    written = read_json(unfinished / "config.json")
    write_json(unfinished / "config.json", written | older_names.of_config(written))
    older_names.amend_tokenizer_config(unfinished)
    share_weights(unfinished)
    flush(unfinished)
    # The weights last: a folder is a checkpoint only with them.
    for path in sorted(unfinished.iterdir(), key=lambda path: (".safetensors" in path.name, path)):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    unfinished.rmdir()


def transformers_can_exit(model: Any, exit_layer: int) -> bool:
    """Whether transformers runs fewer layers where the configuration names fewer, as it does to draft.

    GPT-NeoX and GPT-2 run them all, behind a cache for fewer, and `generate` would fail.

    Args:
        model: as it was loaded, whole and without a recipe.
        exit_layer: the layers to run.
    """
    anatomy = find_model_parts(model)
    inputs, ran = anatomy.probe_inputs(), []
    hooks = [layer.register_forward_hook(lambda *_: ran.append(1)) for layer in anatomy.layers]
    named = getattr(model, model.base_model_prefix).config
    n_layers, named.num_hidden_layers = named.num_hidden_layers, exit_layer
    try:
        with anatomy.probing():
            model(**inputs, use_cache=False)
    except Exception:  # whatever it is, it would come in `generate` too
        return False
    finally:
        named.num_hidden_layers = n_layers
        for hook in hooks:
            hook.remove()
    return len(ran) == exit_layer


def _own_settings(model: Any, trainer: LayerSkipTrainer, config: TrainConfig) -> dict[str, Any]:
    """What transformers has no field for.

    What was known of the model that training began with holds no longer.
    """
    own = recorded(getattr(model.generation_config, settings.KEY, None), {})
    for of_before in ("costs", "draft_text", "draft_vocabulary", "tuning", settings.EXIT):
        own.pop(of_before, None)
    tokenizer: Any = trainer.processing_class
    rows: Any = trainer.train_dataset
    if (found := draft_vocabulary(rows, model, tokenizer.eos_token_id)) is not None:
        own["draft_vocabulary"] = settings.text_of_ids(found)
    if config.keep_draft_text and (text := most_repeated(labels_of(rows))):
        own["draft_text"] = settings.text_of_ids(text)
    return own


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
    with hidden_bars(), lock_output_dir(output):
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
        trainer.add_callback(OptionalTensorBoard())
    if watch is not None:
        trainer.add_callback(ProgressCallback(watch))
    if trainer.is_world_process_zero():
        shutil.rmtree(output / INCOMPLETE, ignore_errors=True)
        warn_low_disk_space(model, output, config.keep_checkpoints)
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
