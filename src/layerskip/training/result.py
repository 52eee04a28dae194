"""What a finished run leaves: an ordinary transformers checkpoint, written beside and renamed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from layerskip.model.files import older_names, settings
from layerskip.model.files.draft_text import most_repeated
from layerskip.model.files.json_files import read_json, write_json
from layerskip.model.files.rounding import recorded
from layerskip.model.files.writing import flush, share_weights
from layerskip.recipe.anatomy import find_anatomy
from layerskip.training.checkpoints import INCOMPLETE
from layerskip.training.config import TrainConfig
from layerskip.training.draft_vocabulary import draft_vocabulary, labels_of
from layerskip.training.loading import merged
from layerskip.training.trainer import LayerSkipTrainer


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
    anatomy = find_anatomy(model)
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
