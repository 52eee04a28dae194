"""What training begins with: a tokenizer and a model, from a folder, the hub or a built-in name."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from layerskip.errors import TrainingWarning
from layerskip.fileio import read_json
from layerskip.model.architecture import UnsupportedModelError
from layerskip.model.checkpoint import check_folder
from layerskip.model.datastore import sampled
from layerskip.model.draft_vocabulary import worth_drafting
from layerskip.model.families import (
    OWN_KERNELS,
    check_causal,
    check_not_quantized,
    check_weights_unnamed,
)
from layerskip.model.hardware import has_fast_bfloat16
from layerskip.model.hub import BUILTIN_MODELS, BuiltinModel, kind_of, pull
from layerskip.model.tokenizer import read
from layerskip.model.weights import SafetensorsFiles
from layerskip.recipe.exit_loss import IGNORED_LABEL
from layerskip.recipe.model_parts import find_model_parts
from layerskip.training.config import TrainConfig, default_alpha
from layerskip.training.data import end_of_turn

_PRODUCT = (1024, 768, 2048)  # rows, columns in, columns out: a batch's product in a small model
_TIMES = 5
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def uses_gpu(config: TrainConfig) -> bool:
    """Whether the run is to be on a GPU."""
    return config.device != "cpu" and torch.cuda.is_available()


def arithmetic(config: TrainConfig) -> torch.dtype:
    """The type of a run's products: what `precision` names, or `auto` comes to on this machine."""
    if config.precision != "auto":
        return _DTYPES[config.precision]
    if uses_gpu(config):
        is_fast = has_fast_bfloat16(torch.device("cuda"))
    else:  # with AVX-512 it depends on the processor
        is_fast = has_fast_bfloat16(torch.device("cpu")) and (
            _product_s(torch.bfloat16) < _product_s(torch.float32)
        )
    return torch.bfloat16 if is_fast else torch.float32


@functools.cache
def _product_s(dtype: torch.dtype) -> float:
    """Seconds of a product of matrices on the CPU, the least of some, once a process."""
    rows, columns, outputs = _PRODUCT
    x, weight = torch.ones(rows, columns, dtype=dtype), torch.ones(outputs, columns, dtype=dtype)
    seconds = []
    for _ in range(_TIMES):
        start = time.perf_counter()
        functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def pretrained(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of transformers' configurations takes for this name.

    Returns:
        The folder or hub id, and further keyword arguments.

    Raises:
        ValueError: it is what `check_files` refuses, or a built-in model that cannot be fetched.
    """
    if (kind := kind_of(name)) != "builtin":
        check_files(name)
        if kind == "hub":
            _check_no_adapter_on_the_hub(name)
        return name, {}
    is_gguf = isinstance(BUILTIN_MODELS[name], BuiltinModel)
    return str(pull(name)), {"gguf_file": "model.gguf"} if is_gguf else {}


def check_files(name: str) -> None:
    """Refuse files that can be decoded, or made so, but not trained: GGUF files and adapters alone.

    Args:
        name: of a model; a built-in one or a hub id passes.

    Raises:
        ValueError: it is such a file or folder; the message says what to do.
    """
    path = Path(name)
    check_folder(path)
    named = ("model.safetensors", "model.safetensors.index.json")
    if any((path / name).is_file() for name in named):
        # Refuses what is damaged, and files outside of the folder, which transformers would read.
        SafetensorsFiles(path)
    kinds = {file.suffix for file in path.iterdir()} if path.is_dir() else {path.suffix}
    if ".gguf" in kinds and ".safetensors" not in kinds:
        raise ValueError(
            f"GGUF files cannot be trained: make a folder of {name} first, with layerskip export --to hf"
        )


def _check_no_adapter_on_the_hub(name: str) -> None:
    """transformers would load the base that an adapter names, and the adapter even from a pickle."""
    found = None
    # Where there is no such repository, loading it says so.
    with contextlib.suppress(OSError, ValueError):
        found = find_adapter_config_file(name)
    if found is not None:
        raise UnsupportedModelError(
            f"{name} on the hub is or has an adapter: merge it first (peft's merge_and_unload)"
        )


def pretrained_weights(name: str) -> tuple[str, dict[str, Any]]:
    """The same for a model: the weights of a GGUF file are unpacked, since packed ones do not train."""
    folder, arguments = pretrained(name)
    if arguments:
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return folder, arguments


def draft_vocabulary(
    rows: Iterable[Mapping[str, Sequence[int]]], model: Any, end_token: int | None
) -> tuple[int, ...] | None:
    """Count the labels and keep the tokens that are worth their row of the head.

    Args:
        rows: encoded rows, with `labels`.
        model: a transformers model, for the size of its vocabulary and weights.
        end_token: kept in any case, where there is one.

    Returns:
        Token ids, the most frequent first; None where a list would save too little.
    """
    counts = Counter(label for row in rows for label in row["labels"])
    counts.pop(IGNORED_LABEL, None)
    config = model.config.get_text_config()
    weights = sum(weight.numel() for weight in model.parameters())
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size  # the embedding is looked up, not read
    return worth_drafting(
        counts,
        row_share=config.hidden_size / max(weights, 1),
        vocab_size=config.vocab_size,
        always=() if end_token is None else (end_token,),
    )


def labels_of(rows: Any) -> list[list[int]]:
    """What the rows teach to say that a draft text is made from.

    Args:
        rows: encoded rows, with `labels`: a list or a data set, of which no other row is read.
    """
    chosen = (rows[i]["labels"] for i in sampled(len(rows)))
    return [[label for label in labels if label != IGNORED_LABEL] for labels in chosen]


_NO_CODE: dict[str, Any] = {"trust_remote_code": False}  # else transformers would ask
_SHORT_ROWS = 512  # tokens; up to here attention that keeps its weights is faster on a CPU
_KEPT_BYTES = 2 * 2**30  # of such weights, at most
_BEHIND_AN_ANSWER = 4  # tokens of a template, the one that ends it and such as a line break


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer, with a token to pad with where it has one at all; ValueError without one."""
    source = config.tokenizer or config.model
    folder, _ = pretrained(source)  # has its tokenizer unpacked
    with _failures_named(f"no tokenizer in {source}"):

        def file_of(name: str) -> str | None:
            return cached_file(folder, name, _raise_exceptions_for_missing_entries=False)

        def said_by(name: str) -> Mapping[str, Any]:
            return read_json(Path(file)) if (file := file_of(name)) else {}

        tokenizer = read(folder, said_by, is_fast=file_of("tokenizer.json") is not None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(model: PreTrainedModel, pad_token_id: int, *datasets: Any) -> None:
    """A tokenizer may have tokens that the model does not: say so before the first batch has one."""
    embedding: Any = model.get_input_embeddings()
    known = len(embedding.weight)
    found = [rows.data.column("input_ids") for rows in datasets if rows is not None]
    largest = max(int(part.flatten().to_numpy().max()) for ids in found for part in ids.chunks)
    largest = max(largest, pad_token_id)
    if largest >= known:
        raise ValueError(
            f"the rows or their padding have the token {largest}, but this model embeds {known}"
            " tokens: give the model's own tokenizer, or resize the model's embedding first"
        )


def check_positions(model: PreTrainedModel, *datasets: Any) -> None:
    """A row longer than what the model was made for: say so before the first batch has one."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = 0
    for rows in datasets:
        if rows is not None and "position_ids" in rows.column_names:  # packed: of each document
            longest = max(longest, *(max(row) + 1 for row in rows["position_ids"]))
        elif rows is not None:
            longest = max(longest, *map(len, rows["input_ids"]))
    if known is not None and longest > known:
        raise ValueError(
            f"a row has {longest} tokens, but this model knows {known} positions: max_length {known}"
            " cuts rows there"
        )


def check_packing(model: PreTrainedModel) -> None:
    """Raise ValueError where a packed document would see what stands before it.

    Positions that start again are the only sign of a document's beginning, and not every model heeds
    it. So two rows that differ in their first document alone have to agree in the second.
    """
    ids = torch.arange(1, 9).repeat(2, 1)
    ids[1, :4] += 4
    positions = torch.arange(4).repeat(2)[None]
    embedding: Any = model.get_input_embeddings()
    known = len(embedding.weight)
    given: dict[str, Any] = {"position_ids": positions, "use_cache": False}
    try:
        with find_model_parts(model).probing():
            one, other = (model(input_ids=row[None] % known, **given).logits[0, 4:] for row in ids)
        is_apart = torch.allclose(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())
    except TypeError:  # it takes no positions
        is_apart = False
    if not is_apart:
        raise ValueError(
            "packing needs attention that ends where positions start again, which this model has not:"
            " leave packing off"
        )


def add_end_of_turn(model: PreTrainedModel, tokenizer: Any, rows: Any) -> None:
    """Where rows teach that an answer ends with a token of the chat template, decoding is to stop there.

    A base model's end token is another one than that of its template (Qwen 2.5): what was trained on
    conversations would never come to an end.
    """
    settings = model.generation_config
    end = end_of_turn(tokenizer)
    if end is None or settings is None:
        return
    known = settings.eos_token_id
    ends = known if isinstance(known, list) else [] if known is None else [known]
    if end not in ends and any(end in labels[-_BEHIND_AN_ANSWER:] for labels in rows["labels"]):
        settings.eos_token_id = [*ends, end]


def model_config(model: str) -> Any:
    """The configuration of a model to train; ValueError if it cannot be had or trained."""
    folder, arguments = pretrained(model)
    with _failures_named(f"no model in {model}"):
        config = AutoConfig.from_pretrained(folder, **_NO_CODE, **arguments)
    check_weights_unnamed(config.to_dict())
    check_not_quantized(config.to_dict())
    check_causal(config.get_text_config().to_dict())
    return config


def pretrained_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A folder's, hub id's or built-in name's model; ValueError if it cannot be had whole.

    transformers makes up what a checkpoint lacks or has in another shape; that is refused.

    Args:
        name: of the model.
        dtype: of its weights.
    """
    folder, arguments = pretrained_weights(name)
    config = model_config(name)
    with _failures_named(f"the model {name} could not be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,  # the one that was looked at
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else a report of many lines would name them
            **_NO_CODE,
            **OWN_KERNELS,
            **arguments,
        )
    model, found = loaded
    other_shape = [key for key, *_ in found["mismatched_keys"]]
    for keys, what in ((found["missing_keys"], "lacks"), (other_shape, "has another shape of")):
        if keys:
            raise ValueError(
                f"{name} {what} {min(keys)}, which its config.json asks for ({len(keys)} such"
                " weights): save or fetch it again"
            )
    if extra := found["unexpected_keys"]:
        what = f"{name} has weights that its config.json knows nothing of, such as {min(extra)}"
        warnings.warn(f"{what}: they are left out", TrainingWarning, stacklevel=2)
    return model.float() if dtype == torch.float32 else model


def load_model(config: TrainConfig) -> PreTrainedModel:
    """The model, as published or from random weights; ValueError if it cannot be had."""
    if config.from_scratch:
        model = _random_model(config.model)
    else:
        model = pretrained_model(config.model, _weights_dtype(config))
    _make_savable(model)
    is_short = config.max_length <= _SHORT_ROWS and _kept_bytes(model, config) <= _KEPT_BYTES
    if is_short and not uses_gpu(config):
        model.set_attn_implementation("eager")  # faster a step than the CPU's flash kernel
    return model


def _weights_dtype(config: TrainConfig) -> torch.dtype:
    """Float32, in which small updates are not lost. Weights under an adapter get none.

    They stay in bfloat16 where the checkpoint has them in it and products are in it too. In float16 the
    exits' gradients would be too small, so head and norm have to be in float32 there.
    """
    published = model_config(config.model).get_text_config().dtype
    stays = config.lora_rank is not None and published == arithmetic(config) == torch.bfloat16
    return torch.bfloat16 if stays else torch.float32


def _kept_bytes(model: PreTrainedModel, config: TrainConfig) -> int:
    """What attention keeps for backward where it keeps its weights, of a batch of the longest rows."""
    shape: Any = model.config.get_text_config()
    heads, layers = shape.num_attention_heads, shape.num_hidden_layers
    return int(4 * config.batch_size * heads * layers * config.max_length**2)


def _random_model(name: str) -> PreTrainedModel:
    config = model_config(name)
    with _failures_named(f"the model {name} could not be made"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, **_NO_CODE, **OWN_KERNELS
        )
    return model.float()


def _make_savable(model: PreTrainedModel) -> None:
    """Older checkpoints name a temperature and do not say that they sample.

    transformers reads such settings, but does not write them once anything in them was changed, as the
    result's exit layer is. What it would not write at the end is refused now.
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


@contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """Readers of files raise whatever they like; each becomes a ValueError of one line."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        # Too little of it, on a CPU or a GPU, is no fault of the files.
        if isinstance(error, RuntimeError) and "memory" in str(error):
            raise
        raise ValueError(one_line(what, error)) from error


def one_line(what: str, error: Exception) -> str:
    """What went wrong, with the first line of what another library says of it."""
    return f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}"


def with_adapter(model: PreTrainedModel, config: TrainConfig) -> Any:
    """The model with a LoRA adapter on all of its linear layers."""
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
    """A model without its adapter, which is added to the weights: in float32, and rounded once."""
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
