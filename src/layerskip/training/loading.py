"""Loads the tokenizer and model of a run, from a folder, the hub or a built-in name."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)

from layerskip.errors import TrainingWarning
from layerskip.fileio import check_links, read_json
from layerskip.model.architecture import UnsupportedModelError, check_ropes
from layerskip.model.checkpoint import check_folder
from layerskip.model.families import (
    FAMILIES,
    OWN_KERNELS,
    check_causal,
    check_not_quantized,
    check_sizes,
    check_weights_unnamed,
)
from layerskip.model.hardware import product_dtype
from layerskip.model.hub import kind_of, pull
from layerskip.model.repository import fetch_files, split_name
from layerskip.model.tokenizer import check_sentencepiece, read
from layerskip.model.weights import SafetensorsFiles, check_finite
from layerskip.recipe.model_parts import find_model_parts
from layerskip.training.config import TrainConfig, default_alpha
from layerskip.training.data import end_of_turn

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # else transformers would ask
_SHORT_ROWS = 512  # tokens; up to here eager attention is faster on a CPU
_MAX_ATTENTION_BYTES = 2 * 2**30  # of the attention weights that it keeps for backward
# Of a repository on the hub: what configures a model and tokenizer, and its weights.
_SETTINGS_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
_WEIGHT_FILES = ("model*.safetensors",)
_GGUF = "GGUF files cannot be trained: make a folder of {} first, with layerskip export --to hf"
_END_TOKENS = 4  # last tokens of a row, among which is the one that ends an answer


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the log of transformers: what matters to a run is an error or warning of ours."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_gguf_bar() -> Iterator[None]:
    """Hide the progress bar of transformers' GGUF reader, which its own switch leaves on."""
    reader: Any = modeling_gguf_pytorch_utils
    bar = reader.tqdm
    reader.tqdm = lambda items, **options: items
    try:
        yield
    finally:
        reader.tqdm = bar


def uses_gpu(config: TrainConfig) -> bool:
    """Return True for a run on a GPU."""
    return config.device != "cpu" and torch.cuda.is_available()


def arithmetic(config: TrainConfig) -> torch.dtype:
    """Return the dtype of a run's matrix products; `auto` depends on the machine."""
    if config.precision != "auto":
        return _DTYPES[config.precision]
    return product_dtype(torch.device("cuda" if uses_gpu(config) else "cpu"))


def pretrained(name: str) -> tuple[str, dict[str, Any]]:
    """Return the arguments of transformers' `from_pretrained` for a model's settings and tokenizer.

    Returns:
        The folder, and keyword arguments.

    Raises:
        ValueError: `check_files` refuses it, or it cannot be fetched.
    """
    kind = kind_of(name)
    if kind == "builtin":
        return str(pull(name)), {"gguf_file": "model.gguf"}
    if kind == "local":
        check_files(name)
        return name, {}
    repo_id, quantization = split_name(name) or (name, None)
    if quantization:
        raise ValueError(_GGUF.format(name))
    folder = fetch_files(repo_id, _SETTINGS_FILES)
    if (folder / "adapter_config.json").is_file():  # transformers would load the base it names
        raise UnsupportedModelError(
            f"{name} on the hub is or has an adapter: merge it first (peft's merge_and_unload)"
        )
    _check_settings(folder)
    return str(folder), {}


def check_files(name: str) -> None:
    """Refuse a folder that cannot be trained, or from which it is unsafe to load.

    Args:
        name: a folder; a built-in model or a hub id passes.

    Raises:
        ValueError: it has only a GGUF file or adapter, links to files outside of the folder, or has
            damaged weights or weights of another dtype than floats of 16 to 64 bits.
    """
    path = Path(name)
    _check_settings(path)
    if any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        SafetensorsFiles(path)  # refuses damaged files, other dtypes, and files of other folders
    kinds = {file.suffix for file in path.iterdir()} if path.is_dir() else {path.suffix}
    if ".gguf" in kinds and ".safetensors" not in kinds:
        raise ValueError(_GGUF.format(name))


def _check_settings(folder: Path) -> None:
    check_folder(folder)
    check_links(folder)  # training passes on what the files say


def pretrained_weights(name: str) -> tuple[str, dict[str, Any]]:
    """Return `pretrained` of a model with its weights, those of a GGUF file dequantized."""
    folder, arguments = pretrained(name)
    if kind_of(name) == "hub":
        folder = str(fetch_files(name, (*_SETTINGS_FILES, *_WEIGHT_FILES)))
        check_files(folder)
    if arguments:
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return folder, arguments


def load_tokenizer(config: TrainConfig) -> Any:
    """Load the tokenizer, which pads with its end token by default; ValueError without one."""
    source = config.tokenizer or config.model
    folder, _ = pretrained(source)
    with _failures_named(f"no tokenizer in {source}"):

        def fields_of(name: str) -> Mapping[str, Any]:
            return read_json(file) if (file := Path(folder, name)).is_file() else {}

        is_fast = Path(folder, "tokenizer.json").is_file()
        if not is_fast and Path(folder, "tokenizer.model").is_file():
            check_sentencepiece(Path(folder))
        tokenizer = read(folder, fields_of, is_fast=is_fast)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(model: PreTrainedModel, pad_token_id: int, *datasets: Any) -> None:
    """Raise ValueError for a token of the rows or of padding that the model does not embed."""
    embedding: Any = model.get_input_embeddings()
    num_embeddings = len(embedding.weight)
    columns = [rows.data.column("input_ids") for rows in datasets if rows is not None]
    largest = max(int(part.flatten().to_numpy().max()) for ids in columns for part in ids.chunks)
    largest = max(largest, pad_token_id)
    if largest >= num_embeddings:
        raise ValueError(
            f"the rows or their padding have the token {largest}, but this model embeds"
            f" {num_embeddings} tokens: give the model's own tokenizer, or resize the model's"
            " embedding first"
        )


def check_positions(model: PreTrainedModel, *datasets: Any) -> None:
    """Raise ValueError for a row that is longer than the model's context."""
    max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = 0
    for rows in datasets:
        if rows is not None and "position_ids" in rows.column_names:  # restart with each document
            longest = max(longest, *(max(row) + 1 for row in rows["position_ids"]))
        elif rows is not None:
            longest = max(longest, *map(len, rows["input_ids"]))
    if max_positions is not None and longest > max_positions:
        raise ValueError(
            f"a row has {longest} tokens, but this model knows {max_positions} positions:"
            f" max_length {max_positions} cuts rows there"
        )


def check_packing(model: PreTrainedModel) -> None:
    """Raise ValueError where a packed document would attend to the one before it.

    Restarting positions are the only sign of a document's beginning, and not every model takes it. So
    two rows that differ in their first document only must have the same logits in the second.
    """
    ids = torch.arange(1, 9).repeat(2, 1)
    ids[1, :4] += 4
    positions = torch.arange(4).repeat(2)[None]
    embedding: Any = model.get_input_embeddings()
    options: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    try:
        with find_model_parts(model).probing():
            one, other = (
                model(input_ids=row[None] % len(embedding.weight), **options).logits[0, 4:]
                for row in ids
            )
        is_separate = torch.allclose(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())
    except TypeError:  # it takes no positions
        is_separate = False
    if not is_separate:
        raise ValueError(
            "packing needs attention that ends where positions start again, which this model has not:"
            " leave packing off"
        )


def add_end_of_turn(model: PreTrainedModel, tokenizer: Any, rows: Any) -> None:
    """Add the chat template's end of an answer to the end tokens, if the rows have it.

    The end token of some base models is not that of their template (Qwen 2.5): trained on
    conversations, they would never stop.
    """
    settings = model.generation_config
    end = end_of_turn(tokenizer)
    if end is None or settings is None:
        return
    ends = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end not in ends and any(end in labels[-_END_TOKENS:] for labels in rows["labels"]):
        settings.eos_token_id = [*ends, end]


def model_config(model: str) -> Any:
    """Load the configuration of a model; ValueError if it is not available or cannot be trained."""
    folder, arguments = pretrained(model)
    with _failures_named(f"no model in {model}"):
        if not arguments:  # a built-in GGUF file has no config.json
            stored = PreTrainedConfig.get_config_dict(folder)[0]
            check_sizes(stored)
            if stored.get("model_type") in FAMILIES:  # others may have rotary scaling of their own
                check_ropes(stored)
        config = AutoConfig.from_pretrained(folder, **_NO_CODE, **arguments)
    check_weights_unnamed(config.to_dict())
    check_not_quantized(config.to_dict())
    check_causal(config.get_text_config().to_dict())
    return config


def check_memory(config: PreTrainedConfig, name: str) -> None:
    """Raise ValueError where the weights in float32 are larger than the memory of the machine."""
    if not hasattr(os, "sysconf"):
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **_NO_CODE, **OWN_KERNELS)
    needed_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed_bytes > available:
        raise ValueError(
            f"the weights of {name} take {needed_bytes / 1e9:.0f} GB in float32, and this machine has"
            f" {available / 1e9:.0f} GB of memory"
        )


def pretrained_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a model by folder, hub id or built-in name; ValueError if it is not complete.

    transformers would initialize missing or misshapen weights at random.

    Args:
        name: of the model.
        dtype: of its weights.
    """
    folder, arguments = pretrained_weights(name)
    config = model_config(name)
    with _failures_named(f"the model {name} could not be loaded"), _without_gguf_bar():
        check_memory(config, name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,  # the checked one
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            **_NO_CODE,
            **OWN_KERNELS,
            **arguments,
        )
    model, info = loaded
    misshapen = [key for key, *_ in info["mismatched_keys"]]
    for keys, what in ((info["missing_keys"], "lacks"), (misshapen, "has another shape of")):
        if keys:
            raise ValueError(
                f"{name} {what} {min(keys)}, which its config.json asks for ({len(keys)} such"
                " weights): save or fetch it again"
            )
    for key, weight in model.named_parameters():
        if not weight.is_meta:
            check_finite(key, weight)
    if unexpected := info["unexpected_keys"]:
        message = f"{name} has weights that its config.json knows nothing of, such as"
        message += f" {min(unexpected)}: they are left out"
        warnings.warn(message, TrainingWarning, stacklevel=2)
    return model.float() if dtype == torch.float32 else model


def load_model(config: TrainConfig) -> PreTrainedModel:
    """Load the model of a run, or initialize it at random; ValueError if it is not available."""
    if config.from_scratch:
        model = _random_model(config.model)
    else:
        model = pretrained_model(config.model, _weights_dtype(config))
    _make_savable(model)
    is_short = config.max_length <= _SHORT_ROWS
    is_small = is_short and _attention_bytes(model, config) <= _MAX_ATTENTION_BYTES
    if is_small and not uses_gpu(config):
        model.set_attn_implementation("eager")  # faster a step than the CPU's flash kernel
    return model


def _weights_dtype(config: TrainConfig) -> torch.dtype:
    """Return float32, in which small updates are not lost, or bfloat16 for weights under an adapter.

    Those are frozen, so they stay in bfloat16 if the checkpoint and the arithmetic are in it. In
    float16 the exits' gradients would underflow, so head and norm have to be in float32.
    """
    published = model_config(config.model).get_text_config().dtype
    is_bfloat16 = published == arithmetic(config) == torch.bfloat16
    return torch.bfloat16 if is_bfloat16 and config.lora_rank is not None else torch.float32


def _attention_bytes(model: PreTrainedModel, config: TrainConfig) -> int:
    """Return the memory of eager attention's weights in a batch of the longest rows."""
    shape: Any = model.config.get_text_config()
    heads, layers = shape.num_attention_heads, shape.num_hidden_layers
    return int(4 * config.batch_size * heads * layers * config.max_length**2)


def _random_model(name: str) -> PreTrainedModel:
    config = model_config(name)
    with _failures_named(f"the model {name} could not be made"):
        check_memory(config, name)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, **_NO_CODE, **OWN_KERNELS
        )
    return model.float()


def _make_savable(model: PreTrainedModel) -> None:
    """Repair or refuse generation settings that transformers could not write at the end of the run.

    Older checkpoints have a temperature without `do_sample`. transformers reads such settings, but does
    not write them after a change, such as that of the exit layer.
    """
    settings: Any = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"transformers will not write this model's generation_config.json again: {reason}"
            ) from error


@contextlib.contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """Turn any exception of a reader of files into a ValueError of one line."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        # Out of memory, on a CPU or a GPU.
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ValueError(one_line(what, error)) from error


def one_line(what: str, error: Exception) -> str:
    """Return `what` with the first line of an error's message, or two where that is a heading."""
    first, *others = str(error).splitlines() or [type(error).__name__]
    return f"{what}: {' '.join([first, *others[: first.endswith(':')]])}"


def with_adapter(model: PreTrainedModel, config: TrainConfig) -> Any:
    """Add a LoRA adapter to all linear layers of the model."""
    import peft

    assert config.lora_rank is not None
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or default_alpha(config.lora_rank),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def merged(model: Any) -> PreTrainedModel:
    """Merge the adapter into the weights, in float32 and rounded once, and remove it."""
    from peft.tuners.lora import LoraLayer

    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            weights: Any = module.get_base_layer()
            dtype = weights.weight.dtype
            weights.float()
            module.merge()
            weights.to(dtype)
    plain: PreTrainedModel = model.unload()
    return plain
