"""`train(config)`: train a checkpoint on rows of text, and write one that can exit early."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainingArguments, set_seed
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import align_special_tokens

from layerskip.data.readers import hidden_bars
from layerskip.errors import TrainingWarning
from layerskip.figures import plot_run
from layerskip.fileio import flush, read_json, replace_json, share_weights, write_json
from layerskip.model import checkpoint as settings
from layerskip.model import tokenizer as older_names
from layerskip.model.checkpoint import recorded
from layerskip.model.draft_data import most_repeated, sampled_rows, worth_drafting
from layerskip.model.families import FAMILIES
from layerskip.model.hardware import keep_freed_memory
from layerskip.model.publish import create_repository, upload
from layerskip.recipe import RecipeConfig, attach, detach
from layerskip.recipe.exit_loss import IGNORED_LABEL
from layerskip.recipe.model_parts import find_model_parts
from layerskip.recipe.schedule import enabled_exits
from layerskip.training.callbacks import (
    JsonLinesLog,
    Progress,
    ProgressCallback,
    StopSignals,
    TimeBudget,
    check_gpus,
    read_log,
    time_spent,
)
from layerskip.training.card import model_card
from layerskip.training.checkpointing import (
    INCOMPLETE,
    LOG,
    SETTINGS,
    find_resume_checkpoint,
    load_renamed,
    lock_output_dir,
    unwritten,
)
from layerskip.training.config import TrainConfig
from layerskip.training.data import (
    Collator,
    encoding_of,
    ending_of_prompts,
    find_rows,
    load_rows,
)
from layerskip.training.loading import (
    add_end_of_turn,
    arithmetic,
    check_packing,
    check_positions,
    check_tokens,
    load_model,
    load_tokenizer,
    merged,
    model_config,
    one_line,
    quiet_transformers,
    uses_gpu,
    with_adapter,
)
from layerskip.training.trainer import LayerSkipTrainer

_OTHER_SCHEDULERS = (  # need settings of their own, or evaluations
    "warmup_stable_decay",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "reduce_lr_on_plateau",
    "greedy",
)


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        output: folder of the checkpoint.
        steps: optimizer steps done.
        metrics: of training and of the last evaluation.
        exit_layer: exit written into the checkpoint.
        url: address of the uploaded result, or None.
    """

    output: Path
    steps: int
    metrics: dict[str, float]
    exit_layer: int
    url: str | None = None


def train(config: TrainConfig, watch: Callable[[Progress], None] | None = None) -> TrainResult:
    """Train a model with the recipe and write an ordinary transformers checkpoint.

    The folder `config.output` gets the model (a LoRA adapter merged, and beside it in `adapter/`),
    tokenizer, a model card, `train.json` (all settings), `train_log.jsonl`, pictures and
    `checkpoint-*` to resume from. With `push_to_hub` model, tokenizer and card are uploaded. Under
    `torchrun` or `accelerate launch` all processes call this. Nothing is printed. Ctrl-C and SIGTERM
    raise KeyboardInterrupt; a run of one process first finishes its step and writes a checkpoint.

    Args:
        config: the settings.
        watch: called with the progress, in the first process.

    Raises:
        ImportError: a package is missing.
        ValueError: settings do not fit each other, the data or the model; before training.
        NonFiniteLossError, UnwrittenCheckpointError: training stopped; checkpoints are kept.
        UploadError: the hub refuses the upload; before training where it can be known.
    """
    check_packages()
    output = Path(config.output)
    with sigterm_as_interrupt(), hidden_bars(), quiet_transformers(), lock_output_dir(output):
        return _train(config, output, watch)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Handle SIGTERM, as a scheduler or `kill` sends it, like Ctrl-C.

    A handler that is there stays, such as that of the command line, and only the main thread can set
    one.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _train(
    config: TrainConfig, output: Path, watch: Callable[[Progress], None] | None
) -> TrainResult:
    # 1. Check the folder, the settings and the first rows, before anything takes long.
    resume_from = find_resume_checkpoint(config, output)
    set_seed(config.seed)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    check_installed(config)
    exit_layer = check_layers(config)
    if config.push_to_hub is not None and os.environ.get("RANK", "0") == "0":
        create_repository(config.push_to_hub, private=config.private)
    tokenizer = load_tokenizer(config)
    encoding = encoding_of(config, tokenizer)
    sources = find_rows(config, encoding)
    # 2. Load the model, and try the recipe on it.
    model = load_model(config)
    attach(model, config.effective_recipe)
    detach(model)
    can_exit = transformers_can_exit(model, exit_layer)
    if config.packing:
        check_packing(model)
    if config.lora_rank is not None:
        model = with_adapter(model, config)
    # 3. Encode all rows.
    train_rows, eval_rows = load_rows(config, encoding, *sources)
    check_tokens(model, tokenizer.pad_token_id or 0, train_rows, eval_rows)
    check_positions(model, train_rows, eval_rows)
    if not can_exit and model.config.model_type not in FAMILIES:
        _warn(
            "nothing will draft with the result: transformers runs all layers of"
            f" {model.config.model_type}, and layerskip's decoder does not know it"
        )
    # Trainer aligns them when it trains, but not when a finished run is resumed.
    align_special_tokens(model, tokenizer)
    add_end_of_turn(model, tokenizer, train_rows)
    use_cache = model.config.use_cache
    # 4. Train.
    trainer = _trainer(config, model, tokenizer, train_rows, eval_rows, exit_layer)
    trainer.add_callback(JsonLinesLog(output / LOG, trainer.attached))
    if importlib.util.find_spec("tensorboard") is not None:
        trainer.add_callback(TensorBoardCallback())
    if watch is not None:
        trainer.add_callback(ProgressCallback(watch))
    if trainer.is_world_process_zero():
        shutil.rmtree(output / INCOMPLETE, ignore_errors=True)
        replace_json(output / SETTINGS, config.as_flat_dict())
    metrics = _run(trainer, config, resume_from)
    _warn_of_untrained_exit(trainer, config.effective_recipe, exit_layer)
    # 5. Evaluate, write the result, and upload it.
    if eval_rows:
        metrics |= _evaluation(trainer)
    detach(model)
    model.config.use_cache = use_cache  # Trainer turned it off
    names = _write(trainer, config, exit_layer, output, can_exit, metrics)
    url = None
    if config.push_to_hub is not None and trainer.is_world_process_zero():
        url = upload(output, names, config.push_to_hub)
    return TrainResult(output, trainer.state.global_step, metrics, exit_layer, url)


def check_packages() -> None:
    """Raise ImportError for a missing package that every run needs."""
    for name in ("accelerate", "datasets"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"training needs {name}; run: pip install 'layerskip[train]'")


def check_installed(config: TrainConfig) -> None:
    """Raise ValueError for a schedule, package or GPU of the settings that is not available."""
    schedulers = [kind.value for kind in SchedulerType if kind.value not in _OTHER_SCHEDULERS]
    if config.scheduler not in schedulers:
        raise ValueError(
            f"there is no scheduler {config.scheduler!r}; there are: {', '.join(schedulers)}"
        )
    if config.device == "cuda" and not uses_gpu(config):
        raise ValueError("the device cuda is not available here; use auto or cpu")
    if uses_gpu(config) and "LOCAL_RANK" not in os.environ:
        check_gpus(torch.cuda.device_count())
    uses_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if uses_fsdp and config.lora_rank is not None:
        raise ValueError("lora_rank needs whole weights, which FSDP divides: use it with DDP")
    if config.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank needs `peft`: pip install 'layerskip[train]'")
    if config.precision == "float16" and not uses_gpu(config):
        raise ValueError("precision float16 needs a GPU; take bfloat16, float32 or auto")


def check_layers(config: TrainConfig) -> int:
    """Check exits against the model's layers, and return the exit for decoding.

    By default it is the first fixed exit, or of those with a loss the one nearest to L/4.

    Raises:
        ValueError: the model has no such layers, or the exit for decoding has no loss and others have.
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
    fixed = [e for e in early if e in recipe.fixed_exits]
    quarter = max(1, round(num_layers / 4))
    nearest = min(early or [quarter], key=lambda e: (abs(e - quarter), e))
    exit_layer: int = config.exit_layer or (fixed[0] if fixed else nearest)
    if not 1 <= exit_layer < max(num_layers, 2):
        raise ValueError(f"exit_layer is {exit_layer}; it must be 1 to {num_layers - 1}")
    if early and exit_layer not in early:  # without any early exit, the run is a control
        raise ValueError(
            f"exit_layer is {exit_layer}, but the exits that have a loss are "
            f"{', '.join(map(str, early))}: name it in fixed_exits or exits too"
        )
    return exit_layer


def transformers_can_exit(model: Any, exit_layer: int) -> bool:
    """Return True where transformers runs as many layers as the configuration names, as it drafts.

    GPT-NeoX and GPT-2 run all of them, with a cache for fewer, and `generate` would fail.

    Args:
        model: without a recipe.
        exit_layer: the layers to run.
    """
    parts = find_model_parts(model)
    inputs, calls = parts.probe_inputs(), []
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in parts.layers]
    base_config = getattr(model, model.base_model_prefix).config
    num_layers, base_config.num_hidden_layers = base_config.num_hidden_layers, exit_layer
    try:
        with parts.probing():
            model(**inputs, use_cache=False)
    except Exception:  # `generate` would raise it too
        return False
    finally:
        base_config.num_hidden_layers = num_layers
        for hook in hooks:
            hook.remove()
    return len(calls) == exit_layer


def _trainer(
    config: TrainConfig,
    model: Any,
    tokenizer: Any,
    train_rows: Any,
    eval_rows: Any,
    exit_layer: int,
) -> LayerSkipTrainer:
    use_gpu = uses_gpu(config)
    # The argument was renamed in transformers.
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
    if config.eval_exits is None:
        trainer.eval_exits = tuple(sorted({*trainer.eval_exits, exit_layer}))
    trainer.remove_callback(PrinterCallback)  # prints to stdout
    if config.max_minutes is not None:
        trainer.add_callback(TimeBudget(config.max_minutes))
    return trainer


def _run(trainer: LayerSkipTrainer, config: TrainConfig, resume_from: str | None) -> dict[str, Any]:
    """Train, unless the checkpoint is that of the last step: Trainer would take one more.

    The last step is also the one at which the time was over.
    """
    rows: Any = trainer.train_dataset
    epoch = -(-len(rows) // (config.batch_size * config.accumulation * trainer.args.world_size))
    total_steps = config.max_steps or math.ceil(config.effective_epochs * epoch)
    if config.warmup_steps >= total_steps:
        _warn(
            f"warmup_steps is {config.warmup_steps}, but there are {total_steps} steps: the learning"
            " rate does not come to its peak"
        )
    if resume_from is not None:
        state = TrainerState.load_from_json(str(Path(resume_from) / TRAINER_STATE_NAME))
        is_over = config.max_minutes is not None and time_spent(state) >= 60 * config.max_minutes
        if is_over or state.global_step >= total_steps:
            if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
                raise ValueError(
                    f"{resume_from} is that of the last step: go on with --resume on one device and"
                    " without FSDP or DeepSpeed, which have nothing to prepare here"
                )
            trainer._load_from_checkpoint(resume_from)
            model: Any = trainer.model
            load_renamed(model, Path(resume_from))
            trainer.state.global_step = state.global_step
            return {}
    with StopSignals(trainer.args.world_size) as signals:
        trainer.add_callback(signals)
        return dict(trainer.train(resume_from_checkpoint=resume_from).metrics)


def _warn_of_untrained_exit(
    trainer: LayerSkipTrainer, recipe: RecipeConfig, exit_layer: int
) -> None:
    """Warn if the time was over before the gradual curriculum reached the exit for decoding."""
    state, layers = trainer.state, trainer.attached.num_layers
    if recipe.curriculum != "gradual" or exit_layer not in recipe.candidates(layers):
        return
    if recipe.variant == "LD" or not 0 < state.global_step < state.max_steps:
        return
    if exit_layer not in enabled_exits(recipe, layers, state.global_step - 1, state.max_steps):
        _warn(
            f"training ended at step {state.global_step} of {state.max_steps}, before exit {exit_layer}"
            " had a loss: name it in fixed_exits, or set max_steps to what the time is enough for"
        )


def _warn(message: str) -> None:
    warnings.warn(message, TrainingWarning, stacklevel=3)


def _evaluation(trainer: LayerSkipTrainer) -> dict[str, Any]:
    """Evaluate after the last step, unless `eval_steps` did so."""
    for log in reversed(trainer.state.log_history):
        if "eval_loss" in log and log["step"] == trainer.state.global_step:
            return {name: value for name, value in log.items() if name.startswith("eval_")}
    return dict(trainer.evaluate())


def _write(
    trainer: LayerSkipTrainer,
    config: TrainConfig,
    exit_layer: int,
    output: Path,
    can_exit: bool,
    metrics: Mapping[str, float],
) -> list[str]:
    """Write the result and plots of the log; return the names of the files to upload."""
    try:
        names = save_result(trainer, config, exit_layer, output, can_exit, metrics)
    except Exception as error:  # the tokenizers library raises Exception for a full disk
        shutil.rmtree(output / INCOMPLETE, ignore_errors=True)
        raise unwritten(f"the result of step {trainer.state.global_step}", output, error) from error
    if trainer.is_world_process_zero():
        try:
            plot_run(read_log(output / LOG), output)
        except OSError as error:
            _warn(one_line("the result is whole, but its pictures could not be written", error))
    return names


def save_result(
    trainer: LayerSkipTrainer,
    config: TrainConfig,
    exit_layer: int,
    output: Path,
    can_exit: bool,
    metrics: Mapping[str, float],
) -> list[str]:
    """Write the result into a folder of its own, and move its files when they are complete.

    Args:
        trainer: after training.
        config: the settings.
        exit_layer: default exit of the result.
        output: the folder.
        can_exit: True where transformers can draft with this model (`transformers_can_exit`).
        metrics: of the last evaluation.

    Returns:
        Names of the files and folders of a checkpoint: without the LoRA adapter, and without the
        Trainer's arguments, which are a pickle. None of them in processes other than the first.
    """
    unfinished = output / INCOMPLETE
    if config.lora_rank is not None:
        trainer.save_model(str(unfinished / "adapter"))
        model = merged(trainer.accelerator.unwrap_model(trainer.model))
        if trainer.is_world_process_zero():
            model.save_pretrained(unfinished)
    else:
        if trainer.is_fsdp_enabled:  # sharded weights, Accelerate's default, are no checkpoint
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(unfinished))
        model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_world_process_zero():
        return []
    if not any(unfinished.glob("*.safetensors")):
        raise OSError("the Trainer wrote no weights")
    if model.generation_config is not None:
        generation_config = model.generation_config
        generation_config.num_assistant_tokens = config.draft_tokens
        # With this mark transformers would drop our settings when it reads the file.
        generation_config._from_model_config = False
        own_settings = _own_settings(model, trainer, config)
        # In transformers' field, unless transformers cannot draft with this model.
        generation_config.assistant_early_exit = exit_layer if can_exit else None
        if not can_exit:
            own_settings[settings.EXIT] = exit_layer
        setattr(generation_config, settings.KEY, own_settings)
        generation_config.save_pretrained(unfinished)
    tokenizer: Any = trainer.processing_class
    tokenizer.save_pretrained(unfinished)
    model_fields = read_json(unfinished / "config.json")
    write_json(unfinished / "config.json", model_fields | older_names.of_config(model_fields))
    older_names.amend_tokenizer_config(unfinished)
    card = model_card(
        config,
        exit_layer=exit_layer,
        num_layers=trainer.attached.num_layers,
        steps=trainer.state.global_step,
        metrics=metrics,
        can_exit=can_exit,
    )
    (unfinished / "README.md").write_text(card, encoding="utf-8")
    share_weights(unfinished)
    flush(unfinished)
    # Weights last: without them the folder does not pass for a checkpoint.
    paths = sorted(unfinished.iterdir(), key=lambda path: (".safetensors" in path.name, path))
    for path in paths:
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    unfinished.rmdir()
    return [path.name for path in paths if path.name not in ("adapter", TRAINING_ARGS_NAME)]


def _own_settings(model: Any, trainer: LayerSkipTrainer, config: TrainConfig) -> dict[str, Any]:
    """Return layerskip's own generation settings; those measured before the training are dropped."""
    own_settings = recorded(getattr(model.generation_config, settings.KEY, None), {})
    of_earlier = ("costs", "draft_text", "draft_vocabulary", "tuning", settings.PROMPT_FORM)
    for name in (*of_earlier, settings.EXIT):
        own_settings.pop(name, None)
    tokenizer: Any = trainer.processing_class
    rows: Any = trainer.train_dataset
    ending = ending_of_prompts((rows[i] for i in sampled_rows(len(rows))), tokenizer)
    if (form := prompt_form(config, ending)) is not None:
        own_settings[settings.PROMPT_FORM] = asdict(form)
    if (vocabulary := draft_vocabulary(rows, model, tokenizer.eos_token_id)) is not None:
        own_settings["draft_vocabulary"] = settings.text_of_ids(vocabulary)
    if config.keep_datastore:
        labels = (rows[i]["labels"] for i in sampled_rows(len(rows)))
        if text := most_repeated([[x for x in row if x != IGNORED_LABEL] for row in labels]):
            own_settings["draft_text"] = settings.text_of_ids(text)
    return own_settings


def prompt_form(config: TrainConfig, ending_of_rows: str = "") -> settings.PromptForm | None:
    """Return the form of the prompts: the given one, else their ending by the template or the rows.

    Args:
        config: the settings.
        ending_of_rows: `ending_of_prompts`, for a template that adds no ending.

    Returns:
        None for prompts of any form.
    """
    ending = config.prompt.rpartition("}")[2]
    if config.prompt_form is not None and config.prompt_example is not None:
        example = config.prompt_example
        ending = ending or example[len(example.rstrip("\n")) :]
        return settings.PromptForm(text=config.prompt_form, example=example, ending=ending)
    template = config.prompt
    if not ending:
        ending, template = ending_of_rows, template + ending_of_rows
    if not ending:
        return None
    name = "a line break" if ending == "\n" else repr(ending)
    text = f"ending in {name}"
    return settings.PromptForm(text=text, example=template, ending=ending)


def draft_vocabulary(
    rows: Iterable[Mapping[str, Sequence[int]]], model: Any, end_token: int | None
) -> tuple[int, ...] | None:
    """Return the tokens of a reduced-vocabulary head, the most frequent labels.

    Args:
        rows: encoded rows, with `labels`.
        model: a transformers model, for the sizes of its vocabulary and weights.
        end_token: always included, unless None.

    Returns:
        Token ids, the most frequent first; None where they would save too little.
    """
    counts = Counter(label for row in rows for label in row["labels"])
    counts.pop(IGNORED_LABEL, None)
    config = model.config.get_text_config()
    weights = sum(weight.numel() for weight in model.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # decoding reads one row of the embedding
    return worth_drafting(
        counts,
        row_share=config.hidden_size / max(weights, 1),
        vocab_size=config.vocab_size,
        always=() if end_token is None else (end_token,),
    )
