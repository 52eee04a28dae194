"""`TrainConfig`: the settings of a training run, whose fields are the flags and YAML keys."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
import types
from collections.abc import Mapping
from dataclasses import Field, InitVar, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from layerskip.model.publish import check_upload
from layerskip.recipe.schedule import RecipeConfig, setting

# The paper's; `continual` is that of Llama2-7B.
_LEARNING_RATES = {"pretrain": 8e-4, "continual": 3e-5, "domain": 1e-4, "task": 1e-4}


_MAX_YAML_CHARS = 2**20
_ALIASES = {"keep_draft_text": "keep_datastore"}  # deprecated names
# A flag -> the settings of a file that it replaces, because they would contradict it.
_REPLACES = {
    "epochs": {"max_steps"},
    "max_steps": {"epochs"},
    "eval_data": {"eval_rows"},
    "eval_rows": {"eval_data", "eval_split"},
    "exits": {"exit_every"},
    "exit_every": {"exits"},
}


_MINIMUM = {"eval_rows": 0, "warmup_steps": 0, "max_length": 2} | dict.fromkeys(
    (
        *("max_steps", "log_steps", "save_steps", "eval_steps", "keep_checkpoints"),
        *("batch_size", "accumulation", "lora_rank", "lora_alpha", "threads"),
        *("exit_layer", "draft_tokens"),
    ),
    1,
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `train`. Invalid values and contradictions raise ValueError.

    The metadata of a field has its meaning (`help`); `settings()` lists these fields and the recipe's
    together, as flags and YAML keys.
    """

    model: str = setting(
        "Folder, hub id or built-in name of the model, or of a configuration with --from-scratch."
    )
    data: str = setting(
        "Hub id, or files: jsonl, json, csv, tsv, txt, parquet; .gz and .xz; may be a pattern."
    )
    output: str = setting("Folder of the result, its checkpoints and logs.")
    regime: Literal["pretrain", "continual", "domain", "task"] = setting(
        "Preset of the recipe.", "continual"
    )
    recipe: RecipeConfig | None = None
    tokenizer: str | None = setting(
        "Folder or hub id of the tokenizer (default: the model's).", None
    )
    from_scratch: bool = setting("Start from random weights of the model's configuration.", False)
    eval_data: str | None = setting("Rows to evaluate on, as --data.", None)
    eval_split: str | None = setting(
        "Split of a hub data set in --eval-data (default: that of --split).", None
    )
    eval_rows: int = setting("Rows of --data held out for evaluation, instead of --eval-data.", 0)
    data_config: str | None = setting(
        "Configuration of a hub data set, such as main of openai/gsm8k.", None
    )
    split: str = setting("Split of a hub data set.", "train")
    prompt: str = setting(
        "Template of the prompt, filled with a row's fields, as in $'{utterance}\\n'.", "{prompt}"
    )
    completion: str = setting("Template of the completion.", "{completion}")
    text_field: str = setting("Field of running text, where rows have no completion.", "text")
    completion_only: bool = setting("Loss on completions only, not on prompts.", True)
    max_length: int = setting("Maximum number of tokens of a row; longer rows are truncated.", 1024)
    packing: bool = setting("Several documents per row, without attention across them.", False)
    batch_size: int = setting("Rows per device.", 8)
    accumulation: int = setting("Batches per optimizer step.", 1)
    epochs: float | None = setting("Passes over the data (default: 1).", None)
    max_steps: int | None = setting("Optimizer steps, instead of --epochs.", None)
    max_minutes: float | None = setting(
        "Time limit; the learning rate schedule fits into it.", None
    )
    learning_rate: float | None = setting("Peak learning rate (default: the regime's).", None)
    scheduler: str = setting("Learning rate schedule, as in transformers.", "cosine")
    warmup_steps: int = setting("Steps in which the learning rate rises.", 0)
    weight_decay: float = setting("Weight decay of AdamW.", 0.0)
    max_grad_norm: float = setting("Gradient clipping to this norm; 0 = off.", 1.0)
    lora_rank: int | None = setting(
        "Train a LoRA adapter of this rank instead of all weights.", None
    )
    lora_alpha: int | None = setting("LoRA scale (default: twice the rank).", None)
    precision: Literal["float32", "bfloat16", "float16", "auto"] = setting(
        "Precision of the arithmetic; trained weights are float32. auto: bfloat16 where that is fast.",
        "float32",
    )
    gradient_checkpointing: bool = setting(
        "Recompute activations: less memory for about a third more time.", False
    )
    compile: bool = setting("Compile the layers with torch.compile.", False)
    eval_exits: tuple[int, ...] | None = setting("Exits to evaluate.", None)
    eval_steps: int | None = setting("Steps between evaluations (default: at the end).", None)
    log_steps: int = setting("Steps between log lines.", 10)
    save_steps: int = setting("Steps between checkpoints.", 500)
    keep_checkpoints: int = setting("Number of checkpoints to keep.", 2)
    exit_layer: int | None = setting("Exit layer written into the result; it needs a loss.", None)
    draft_tokens: int = setting("Draft length written into the result.", 4)
    prompt_form: str | None = setting(
        "One line about the prompts that the result is for, written into it; generate warns of others"
        " (default: the ending of --prompt, or the line break at the end of all prompts).",
        None,
    )
    prompt_example: str | None = setting(
        "Such a prompt; generate warns of prompts without its line break at the end.", None
    )
    keep_datastore: bool = setting(
        "Store the rows that others repeat most in the result, as an n-gram datastore.",
        False,
        flags=("--keep-datastore", "--keep-draft-text"),
    )
    push_to_hub: str | None = setting(
        "Upload the result to this repository (ORG/NAME) of the Hugging Face hub; needs HF_TOKEN or"
        " hf auth login.",
        None,
    )
    private: bool = setting("Make that repository private.", False)
    resume: bool = setting("Resume from the last checkpoint in --output.", False)
    seed: int = setting("Seed of row order, new weights and skipped layers.", 0)
    device: Literal["auto", "cpu", "cuda"] = setting(
        "Device; auto takes a CUDA GPU where one is available.", "auto"
    )
    threads: int | None = setting("CPU threads (default: PyTorch's own number).", None)
    keep_draft_text: InitVar[bool | None] = None  # deprecated name of `keep_datastore`

    def __post_init__(self, keep_draft_text: bool | None) -> None:
        if keep_draft_text is not None:
            object.__setattr__(self, "keep_datastore", keep_draft_text)
        for name in ("model", "tokenizer", "output"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, os.path.expanduser(path))
        self._check_ranges()
        self._check_contradictions()

    def _check_ranges(self) -> None:
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"{name} is {value}; it must be at least {minimum}")
        if not 0 <= self.seed < 2**32:  # NumPy's range
            raise ValueError(f"seed is {self.seed}; it must be in 0 to {2**32 - 1}")
        for name in ("epochs", "learning_rate", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}; it must be a number above 0")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a number, 0 or above")

    def _check_contradictions(self) -> None:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("epochs and max_steps both say when to end; give one of them")
        recipe = self.effective_recipe
        if recipe.variant == "LD" and recipe.fixed_exits:
            raise ValueError("variant LD gives no exit a loss: leave out fixed_exits")
        if self.eval_data is not None and self.eval_rows:
            raise ValueError("eval_data and eval_rows contradict each other; give one of them")
        if not self.eval_rows and self.eval_data is None:
            for name in ("eval_steps", "eval_exits"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} needs rows to evaluate on: give eval_rows or eval_data"
                    )
        if self.eval_split is not None and self.eval_data is None:
            raise ValueError("eval_split needs eval_data")
        if self.eval_data == self.data and self.eval_split in (None, self.split):
            raise ValueError(
                "eval_data is what is trained on; give eval_split, or eval_rows instead"
            )
        if self.from_scratch and self.lora_rank is not None:
            raise ValueError("from_scratch and lora_rank contradict each other")
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError("lora_alpha needs lora_rank")
        if (self.prompt_form is None) != (self.prompt_example is None):
            raise ValueError("prompt_form and prompt_example need each other")
        if self.prompt_form is not None and "\n" in self.prompt_form:
            raise ValueError("prompt_form is one line of text")
        check_upload(self.push_to_hub, self.private)

    @property
    def effective_recipe(self) -> RecipeConfig:
        """The recipe, by default the regime's, with the seed of the run."""
        return replace(self.recipe or RecipeConfig.preset(self.regime), seed=self.seed)

    @property
    def effective_epochs(self) -> float:
        """Passes over the data, by default one."""
        return self.epochs or 1.0

    @property
    def effective_learning_rate(self) -> float:
        """The peak learning rate, by default the regime's."""
        return self.learning_rate or _LEARNING_RATES[self.regime]

    @classmethod
    def settings(cls) -> dict[str, Field[Any]]:
        """Return all settings by name: the fields of this class and of the recipe."""
        settings = {field.name: field for field in fields(RecipeConfig)}
        run_settings = {field.name: field for field in fields(cls) if field.name != "recipe"}
        return run_settings | {n: f for n, f in settings.items() if n not in run_settings}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration of flat names, such as YAML keys or flags; None = unset.

        Strings are converted to the type of the field ('1e-4', '4,8'). Names of the recipe change the
        regime's preset.

        Raises:
            ValueError: an unknown or missing name, or a value of another type.
        """
        settings = cls.settings()
        values = {_setting_name(name): v for name, v in values.items() if v is not None}
        for name in values:
            if name not in settings:
                similar = difflib.get_close_matches(name, settings, 1)
                advice = f"; did you mean {similar[0]!r}?" if similar else ""
                raise ValueError(f"there is no setting {name!r}{advice}")
        hints = get_type_hints(RecipeConfig) | get_type_hints(cls)
        converted = {name: _convert(name, v, hints[name]) for name, v in values.items()}
        if missing := [name for name in ("model", "data", "output") if name not in converted]:
            raise ValueError(f"{', '.join(missing)} must be given")
        run_names = {field.name for field in fields(cls)}
        run_settings = {name: v for name, v in converted.items() if name in run_names}
        recipe_names = {field.name for field in fields(RecipeConfig)}  # `seed` is of both
        recipe_settings = {name: v for name, v in converted.items() if name in recipe_names}
        recipe = RecipeConfig.preset(converted.get("regime", cls.regime), **recipe_settings)
        return cls(recipe=recipe, **run_settings)

    @classmethod
    def from_yaml(cls, path: str | Path, **changes: Any) -> TrainConfig:
        """Read a YAML file of settings.

        Args:
            path: the file.
            changes: flags, which override the file, also where it would contradict them: `eval_data`
                replaces the file's `eval_rows`.

        Raises:
            ValueError: the file is no mapping of settings.
        """
        flags = {name: v for name, v in changes.items() if v is not None}
        replaced = set().union(*(_REPLACES.get(name, ()) for name in flags))
        file_settings = {name: v for name, v in read_settings(path).items() if name not in replaced}
        return cls.from_mapping({**file_settings, **flags})

    def as_flat_dict(self) -> dict[str, Any]:
        """Return the flat names and values that `from_mapping` takes; None = unset."""
        return asdict(self.effective_recipe) | {
            name: value for name, value in asdict(self).items() if name != "recipe"
        }


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the settings of a YAML file, without conversion.

    Raises:
        ValueError: the file is no mapping.
    """
    import yaml  # type: ignore[import-untyped, unused-ignore]

    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_MAX_YAML_CHARS + 1)
        if len(text) > _MAX_YAML_CHARS:
            raise ValueError(f"it has more than {_MAX_YAML_CHARS:,} characters")
        values = yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: lines 'name: value' are needed") from None
    except (yaml.YAMLError, ValueError) as error:  # too long, not UTF-8, or an impossible date
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must have lines of the form 'name: value'")
    return {_setting_name(name): value for name, value in values.items()}


def _setting_name(name: Any) -> str:
    name = str(name).replace("-", "_")
    return _ALIASES.get(name, name)


def default_alpha(rank: int) -> int:
    """Return the default LoRA scale of a rank."""
    return 2 * rank


def plain_type(hint: Any) -> Any:
    """Return the type of a setting without `| None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Convert a value of YAML or a flag to the type of a field."""
    kind = plain_type(hint)
    try:
        if get_origin(kind) is tuple:
            items = value.replace(",", " ").split() if isinstance(value, str) else value
            if isinstance(items, bool):  # YAML's yes and no
                raise ValueError
            items = [items] if isinstance(items, int) else items
            return tuple(map(_whole, items))
        if kind is bool and isinstance(value, bool):
            return value
        if isinstance(value, (bool, list, dict)) and kind in (bool, int, float, str):
            raise ValueError
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind in (int, float, str):
            return _whole(value) if kind is int else kind(value)
    except (ValueError, TypeError, KeyError, OverflowError):
        expected = (
            "a list of numbers" if get_origin(kind) is tuple else f"a value of {kind.__name__}"
        )
        raise ValueError(f"{name} is {_short_repr(value)}, not {expected}") from None
    choices = get_args(kind)
    if value not in choices:
        raise ValueError(
            f"{name} is {_short_repr(value)}; it can be {', '.join(map(repr, choices))}"
        )
    return value


def _short_repr(value: Any) -> str:
    """Abbreviate a value: with YAML aliases a few lines can expand to endless lists of lists."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 100, 100
    return short.repr(value)


def _whole(value: Any) -> int:
    if float(value) != int(value):
        raise ValueError
    return int(value)
