"""What settings name, compared with this machine and with the model before anything takes long."""

from __future__ import annotations

import importlib.util
import os
import warnings

import torch
from transformers import SchedulerType

from layerskip.model.families import FAMILIES
from layerskip.training.config import TrainConfig
from layerskip.training.device import uses_gpu
from layerskip.training.errors import TrainingWarning
from layerskip.training.loading import model_config
from layerskip.training.recipe_callback import check_gpus

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
