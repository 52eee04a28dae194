"""Opens a checkpoint: config, generation settings and tokenizer, and from its tensors the decoder.

Second step of loading (`hub` -> `checkpoint` -> `weights` -> `loader`). `open_files` reads everything
but the weights, which stay in the files (`Files.tensors`); `load` goes on to `loader.build`, after
which they are in the decoder.

The generation settings are in `generation_config.json`: in transformers' own fields where it has one,
else under the key `layerskip`: `exit_layer`, for models that transformers cannot draft with, whose
`generate` would fail with its own field; `draft_vocabulary`, token ids in one text, the most useful
first; `draft_text`, token ids of an n-gram datastore; `costs`, a list of `StepCosts`; `weights`, the
measured cost of quantized weights, such as {"int4": {"method": ..., "nll_change": ...}}; `prompt_form`,
the prompts that the model was trained for, such as {"text": "a command and a line break", "example":
"Wake me at seven\\n", "ending": "\\n"}.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from layerskip.fileio import CheckpointError, check_within, read_json, replace_json
from layerskip.model import families, loader, tokenizer
from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.block_formats import FORMATS
from layerskip.model.decoder import Decoder, interleave
from layerskip.model.quantize import INT4_KINDS, STORED, bits_of
from layerskip.model.weights import GgufFile, SafetensorsFiles, Tensors
from layerskip.paths import cache_folder

FILE = "generation_config.json"
DRAFT_TEXT_FILE = "draft_text.table"  # not *.safetensors, which other tools would take for weights
ADAPTER_FILE = "exit_adapter.safetensors"  # see `exit_adapter`
KEY = "layerskip"
EXIT = "exit_layer"  # under that key
FIELD = "weights"  # under that key
PROMPT_FORM = "prompt_form"  # under that key
CALIBRATED = "calibration"
_HEAD = "lm_head.weight"


class SettingsWarning(UserWarning):
    """A setting is ignored, because it cannot be read or is not supported."""


class RoundingWarning(UserWarning):
    """Quantized weights cost quality, or may."""


# --- costs and settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Costs of decoding on one machine, in units of a plain step of one token.

    Attributes:
        dtype: of the weights that were timed, such as "bfloat16".
        weights: their format, such as "16bit".
        device: "cpu" or "cuda".
        kernels: what ran the layers, see `Decoder.kernels`.
        machine: see `hardware.machine`; "" = unknown.
        threads: of the CPU; 0 = unknown.
        exit_layer: E of the drafts that were timed.
        draft_step: the first E layers and the draft's head over one token.
        draft_tokens_scored: the number of tokens that this head scores.
        head: final norm, whole head and argmax, for one token.
        passes: all layers and the head over 1, 2, ... positions; the first is 1.
        overhead: of a round, beside its parts.
        context: positions in the KV cache during the timing; 0 = few or unknown.
    """

    dtype: str
    weights: str
    device: str
    kernels: str
    exit_layer: int
    draft_step: float
    draft_tokens_scored: int
    head: float
    passes: tuple[float, ...]
    overhead: float
    machine: str = ""
    threads: int = 0
    context: int = 0

    @property
    def kind(self) -> tuple[str, ...]:
        """The conditions that costs depend on most: dtype, weights, device, kernels, machine."""
        return self.dtype, self.weights, self.device, self.kernels, self.machine

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, in four digits."""
        fields = dataclasses.asdict(self)
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}
        return rounded | {"passes": " ".join(f"{cost:.4f}" for cost in self.passes)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "StepCosts":
        """Invert `to_dict`; AttributeError, KeyError, TypeError or ValueError for other fields."""
        passes = tuple(float(cost) for cost in fields["passes"].split())
        names = ("draft_step", "draft_tokens_scored", "head", "exit_layer")
        numbers = (*passes, *(fields[name] for name in names))
        if not passes or not all(0 < number < math.inf for number in numbers):
            raise ValueError("costs are numbers above 0")
        if not math.isfinite(fields["overhead"]):
            raise ValueError("the overhead is no number")
        if not isinstance(fields.get("context", 0), int) or fields.get("context", 0) < 0:
            raise ValueError("the context is no number of positions")
        return cls(**{**fields, "passes": passes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptForm:
    """The form of the prompts that a checkpoint was trained for.

    Attributes:
        text: one line about it.
        example: such a prompt.
        ending: of every such prompt; "" = any.
    """

    text: str
    example: str
    ending: str = ""

    def fits(self, prompt: str) -> bool:
        """Return True if a prompt has the ending."""
        return prompt.endswith(self.ending)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Decoding settings of a checkpoint, from `generation_config.json`.

    Attributes:
        end_tokens: `eos_token_id`.
        exit_layer: E, `assistant_early_exit` or `layerskip.exit_layer`.
        draft_tokens: d, `num_assistant_tokens`.
        draft_vocabulary: the tokens that an early exit drafts, the most useful first; None = all.
        draft_text: searched for n-grams, beside prompt and output.
        draft_text_file: an n-gram datastore beside the weights, which replaces `draft_text`.
        costs: measured, one for each weight format and machine that the model was tuned with.
        prompt_form: of the prompts that the model was trained for; None = any.
    """

    end_tokens: tuple[int, ...] = ()
    exit_layer: int | None = None
    draft_tokens: int | None = None
    draft_vocabulary: tuple[int, ...] | None = None
    draft_text: tuple[int, ...] | None = None
    draft_text_file: Path | None = None
    costs: tuple[StepCosts, ...] = ()
    prompt_form: PromptForm | None = None

    def measured_for(self, *kind: str, threads: int = 0) -> "CheckpointSettings":
        """Drop costs that were measured for another `StepCosts.kind` or other threads."""
        costs = [c for c in self.costs if c.kind == kind and c.threads in (0, threads)]
        costs.sort(key=lambda c: c.threads, reverse=True)
        return dataclasses.replace(self, costs=tuple(costs))

    @property
    def measured(self) -> StepCosts | None:
        """The costs of a loaded model, whose settings went through `measured_for`."""
        return self.costs[0] if self.costs else None


# Fields of generation_config.json that change greedy outputs too -> the value without effect.
_NOT_APPLIED: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "num_beams": 1,
}


def read_settings(path: Path, config: dict[str, Any], vocab_size: int) -> CheckpointSettings:
    """Read `generation_config.json`, if there is one; the config has the default end tokens.

    Raises:
        CheckpointError: a field has an impossible value.
    """
    file = path / FILE
    fields = read_json(file) if path.is_dir() and file.is_file() else {}
    ends = fields.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if any(type(token) is not int or token < 0 for token in ends):
        raise CheckpointError(
            f"eos_token_id is {ends} in {file} (or config.json), token ids are needed"
        )
    ends = [token for token in dict.fromkeys(ends) if token < vocab_size]
    _warn_of_ignored_fields(fields, file)
    extra = _layerskip_fields(fields)
    vocabulary = _token_ids(extra, "draft_vocabulary", vocab_size, file)
    if vocabulary is not None:  # so that the end of the output can be drafted too
        vocabulary = tuple(dict.fromkeys((*vocabulary, *ends)))
    datastore = path / DRAFT_TEXT_FILE
    if datastore.is_file():
        check_within(datastore, is_read=True)
    return CheckpointSettings(
        end_tokens=tuple(ends),
        exit_layer=exit_layer_of(fields, file),
        draft_tokens=_positive_int(fields, "num_assistant_tokens", file),
        draft_vocabulary=vocabulary,
        draft_text=_token_ids(extra, "draft_text", vocab_size, file),
        draft_text_file=datastore if datastore.is_file() else None,
        costs=costs_of(extra, file),
        prompt_form=_prompt_form(extra, file),
    )


def _prompt_form(extra: dict[str, Any], file: Path) -> PromptForm | None:
    fields = extra.get(PROMPT_FORM)
    if fields is None:
        return None
    try:
        form = PromptForm(**fields)
    except TypeError:
        form = None
    if form is None or not all(isinstance(v, str) for v in dataclasses.astuple(form)):
        _warn(f"{PROMPT_FORM} in {file} needs the texts `text`, `example` and `ending`")
        return None
    return form


def exit_layer_of(fields: dict[str, Any], file: Path) -> int | None:
    """Return the exit layer in `generation_config.json`: transformers' field, else ours.

    Raises:
        CheckpointError: it is no whole number above 0.
    """
    exit_layer = _positive_int(fields, "assistant_early_exit", file)
    return exit_layer or _positive_int(_layerskip_fields(fields), EXIT, file)


def text_of_ids(token_ids: Iterable[int]) -> str:
    """Format token ids as one text: a JSON list would fill thousands of lines."""
    return " ".join(map(str, token_ids))


def costs_of(extra: dict[str, Any], file: Path) -> tuple[StepCosts, ...]:
    """Return the costs under our key in `generation_config.json`; warn of unreadable ones."""
    costs = []
    for fields in entries_of(extra):
        entry = readable_costs(fields)
        if isinstance(entry, StepCosts):
            costs.append(entry)
        else:
            _warn(f"costs in {file} cannot be read ({entry}); going on without: tune again")
    return tuple(costs)


def entries_of(extra: dict[str, Any]) -> list[Any]:
    """Return the costs as they are stored under our key, readable or not."""
    costs = extra.get("costs") or []
    return costs if isinstance(costs, list) else [costs]


def readable_costs(fields: Any) -> StepCosts | Exception:
    """Return costs, or the reason why they cannot be read: damage, or another version."""
    try:
        return StepCosts.from_dict(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return error


def special_tokens(config: Mapping[str, Any], end_tokens: Collection[int]) -> dict[str, Any]:
    """Return the fields that transformers takes from `config.json` if `FILE` does not exist."""
    names = ("bos_token_id", "pad_token_id")
    fields = {name: config[name] for name in names if config.get(name) is not None}
    ends = list(end_tokens)
    return fields | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


def _warn(message: str) -> None:
    warnings.warn(message, SettingsWarning, stacklevel=2)


def _layerskip_fields(fields: dict[str, Any]) -> dict[str, Any]:
    extra = fields.get(KEY)
    return extra if isinstance(extra, dict) else {}


def _warn_of_ignored_fields(fields: dict[str, Any], file: Path) -> None:
    ignored = [
        f"{name} {fields[name]}"
        for name, off in _NOT_APPLIED.items()
        if fields.get(name, off) not in (off, None, [], {})
    ]
    if ignored:
        hint = " (--repetition-penalty applies that)" * ignored[0].startswith("repetition")
        _warn(
            f"{file} names {', '.join(ignored)}, which transformers applies to greedy answers too and"
            f" layerskip does not{hint}"
        )


def _positive_int(fields: dict[str, Any], key: str, file: Path) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 1:  # a bool is an int too
        raise CheckpointError(f"{key} in {file} is {value!r}, a whole number above 0 is needed")
    return value


def _token_ids(
    extra: dict[str, Any], key: str, vocab_size: int, file: Path
) -> tuple[int, ...] | None:
    text = extra.get(key)
    if not text:
        return None
    try:
        ids = tuple(int(word) for word in text.split())
    except (AttributeError, ValueError):
        ids = (-1,)
    if min(ids, default=-1) < 0 or max(ids) >= vocab_size:
        _warn(
            f"{key} in {file} has to be token ids of 0 to {vocab_size - 1} with spaces between them;"
            " going on without: tune again"
        )
        return None
    return ids


# The checkpoints that the paper's authors published, and their best exit layer and draft length as far
# as they are known. Sources: the paper (arXiv 2404.16710), its tables for summarization on CNN/DM; and
# the article at huggingface.co/blog/layerskip, which has an exit layer for summarization and no draft
# length.
PUBLISHED = {
    "facebook/layerskip-llama2-7B": CheckpointSettings(exit_layer=8, draft_tokens=12),  # paper
    "facebook/layerskip-llama2-13B": CheckpointSettings(exit_layer=15, draft_tokens=12),  # paper
    "facebook/layerskip-llama2-70B": CheckpointSettings(exit_layer=10),  # article
    "facebook/layerskip-codellama-7B": CheckpointSettings(),
    "facebook/layerskip-codellama-34B": CheckpointSettings(),
    "facebook/layerskip-llama3-8B": CheckpointSettings(exit_layer=4),  # article
    "facebook/layerskip-llama3.2-1B": CheckpointSettings(exit_layer=4),  # article
}


def with_defaults(name: str, settings: CheckpointSettings) -> CheckpointSettings:
    """Fill in the exit layer and draft length of a published checkpoint, unless its files have them.

    Args:
        name: what the checkpoint was loaded by; only a hub id of `PUBLISHED` changes anything.
        settings: from its own files.
    """
    published = PUBLISHED.get(name)
    if published is None or settings.exit_layer is not None:
        return settings
    draft_tokens = settings.draft_tokens or published.draft_tokens
    return dataclasses.replace(settings, exit_layer=published.exit_layer, draft_tokens=draft_tokens)


# --- the measured cost of quantized weights


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The method by which a checkpoint's weights were quantized, and the measured cost.

    Attributes:
        method: `CALIBRATED`.
        nll_change: of the held-out part of the calibration text, against the same weights in bfloat16,
            0.02 = 2% more; None if it was not measured.
    """

    method: str
    nll_change: float | None = None


_MAX_CHANGE = 0.05  # of the negative log-likelihood; a higher cost is reported at load time
_FOUR_BIT_TYPES = tuple(kind.name for kind in INT4_KINDS)


def recorded(extra: Any, roundings: Mapping[str, Rounding]) -> dict[str, Any]:
    """Replace the measured costs in the `layerskip` object of `generation_config.json`.

    Args:
        extra: the object so far, if there is one.
        roundings: "int8" or "int4" to its cost.
    """
    rest = {k: v for k, v in extra.items() if k != FIELD} if isinstance(extra, dict) else {}
    if roundings:
        rest[FIELD] = {name: dataclasses.asdict(cost) for name, cost in roundings.items()}
    return rest


def warn_of_rounding(path: Path, tensors: Tensors, weights: str) -> None:
    """Warn if the cost of loading a checkpoint with these weights is high or unknown.

    An unknown cost of int8 is harmless. Nothing is rounded, and no warning needed, where every matrix of
    the layers is stored in int4 already.

    Args:
        path: of the checkpoint.
        tensors: of the checkpoint.
        weights: a key of `quantize.WEIGHTS`.

    Warns:
        RoundingWarning: see above.
    """
    if bits_of(weights) is None:
        return
    matrices = [n for n in tensors.names() if ".layers." in n and len(tensors.shape(n)) == 2]
    if weights == "int4" and all(tensors.stored_as(n) in _FOUR_BIT_TYPES for n in matrices):
        return
    file = path / FILE
    costs = _layerskip_fields(read_json(file)).get(FIELD) if file.is_file() else None
    cost = costs.get(weights) if isinstance(costs, dict) else None
    change = cost.get("nll_change") if isinstance(cost, dict) else None
    if not isinstance(cost, dict) and weights == "int4":
        message = (
            "what 4 bits cost this checkpoint is not known, and may be much; `layerskip export --to hf"
            " --weights int4 --calibrate TEXT` measures it and makes it less"
        )
    elif isinstance(change, float) and not change <= _MAX_CHANGE:  # NaN is reported too
        message = (
            f"{weights} costs this checkpoint {change:.0%} negative log-likelihood on the text that it"
            " was measured with; --weights int8 costs less"
        )
    else:
        return
    warnings.warn(message, RoundingWarning, stacklevel=4)  # of `from_pretrained`


# --- files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """An opened checkpoint: everything but the weights, which `tensors` reads one at a time.

    Attributes:
        path: the folder or GGUF file.
        architecture: of its decoder.
        tensors: still in the files.
        config: transformers' config with its defaults filled in; of a GGUF file, the end tokens alone.
        tied: the head is the embedding.
        settings: for decoding.
    """

    path: Path
    architecture: Architecture
    tensors: Tensors
    config: dict[str, Any]
    tied: bool
    settings: CheckpointSettings

    def tokenizer(self) -> Any:
        """Return the checkpoint's tokenizer, or None (see `tokenizer.load`)."""
        return tokenizer.load(self.path, self._gguf_file)

    def write_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder (see `tokenizer.write`)."""
        tokenizer.write(self.path, folder, self._gguf_file)

    def names(self) -> set[str]:
        """Return the names of the model's tensors, without a tied head and buffers."""
        names = families.FAMILIES[self.architecture.family].names
        left_out = {f"{names.head}.weight"} if self.tied else set()
        return {n for n in self.tensors.names() - left_out if not n.endswith(names.ignored)}

    @property
    def _gguf_file(self) -> GgufFile | None:
        return self.tensors if isinstance(self.tensors, GgufFile) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded checkpoint; `tokenizer` is None if it has no tokenizer files."""

    path: Path
    decoder: Decoder
    tokenizer: Any
    settings: CheckpointSettings


def load(
    path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    weights: str = "16bit",
    kv_cache: str = "auto",
    compiled: bool | Callable[[Architecture], bool] = False,
) -> Checkpoint:
    """Load a checkpoint folder (safetensors, or one GGUF file in it) or a GGUF file.

    Args:
        path: the folder or file.
        dtype: of everything that is not quantized; None = `loader.fast_dtype`.
        device: of the decoder.
        weights: a key of `quantize.WEIGHTS`.
        kv_cache: one of `kv_cache.KV_CACHES`.
        compiled: use the kernels of `native`, which have to be prepared, or `torch_compile` on a GPU;
            or a function that decides it.

    Raises:
        CheckpointError: files are missing, damaged, or inconsistent.
        UnsupportedModelError: the architecture, or a part of it, is not supported; it is named.
        ValueError: `weights` is unknown, or `kv_cache` is not supported.

    Warns:
        RoundingWarning: the cost of `weights` is high or unknown.
    """
    files = open_files(path)
    weights = _resolve(weights, files.tensors)
    warn_of_rounding(path, files.tensors, weights)
    compiled = compiled(files.architecture) if callable(compiled) else compiled
    if dtype is None:
        dtype = loader.fast_dtype(files.architecture, torch.device(device), compiled)
    return Checkpoint(
        path=path,
        decoder=loader.build(
            files.architecture,
            files.tensors,
            tied=files.tied,
            dtype=dtype,
            device=device,
            weights=weights,
            kv_cache=kv_cache,
            compiled=compiled,
        ),
        tokenizer=files.tokenizer(),
        settings=files.settings,
    )


def _resolve(weights: str, tensors: Tensors) -> str:
    """Return "16bit" for "stored" weights that are not quantized."""
    stored_formats = {kind.name for kind in FORMATS}
    if weights == STORED and not any(
        tensors.stored_as(name) in stored_formats for name in tensors.names()
    ):
        return "16bit"
    return weights


def open_files(path: Path) -> Files:
    """Open a checkpoint without reading its weights; raises what `load` raises."""
    check_folder(path)
    gguf_path = _gguf_in(path)
    tensors: Tensors
    if gguf_path is not None:
        tensors = file = GgufFile(gguf_path)
        with _naming(file.path):
            architecture = file.architecture()
            config: dict[str, Any] = {"eos_token_id": tokenizer.end_tokens(file)}
        tied = _HEAD not in tensors.names()
    else:
        config = _config(path)
        with _naming(path / "config.json"):
            architecture = families.from_config(config)
        tensors = SafetensorsFiles(path)
        tied = _is_tied(tensors, architecture.family, bool(config.get("tie_word_embeddings")))
    return Files(
        path=path,
        architecture=architecture,
        tensors=tensors,
        config=config,
        tied=tied,
        settings=read_settings(path, config, architecture.vocab_size),
    )


def check_folder(path: Path) -> None:
    """Check a checkpoint that somebody else made, before anything is allocated for it.

    The one check of a foreign folder: an adapter is refused (see `check_no_adapter`), and so is a
    `config.json` with impossible sizes, whatever its model type. A GGUF file or a name on the hub
    passes: its header is checked when it is opened.

    Raises:
        CheckpointError, UnsupportedModelError: it is refused.
    """
    check_no_adapter(path)
    config = path / "config.json"
    if config.is_file():
        with _naming(config):
            families.check_sizes(read_json(config))


def check_no_adapter(folder: Path) -> None:
    """Refuse a peft adapter, alone or beside weights.

    transformers would apply one that is beside weights, even from a pickle; this package does not.

    Raises:
        UnsupportedModelError: there is one; if it is alone, its base is named if it is known.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    if (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} has an adapter beside its weights: merge it (peft's merge_and_unload), or take"
            " adapter_config.json away"
        )
    base = read_json(file).get("base_model_name_or_path")
    into = f", {base}," if base else ""
    raise UnsupportedModelError(
        f"{folder} is a LoRA adapter; merge it into its base{into} first (peft's merge_and_unload)"
    )


def _gguf_in(path: Path) -> Path | None:
    """Return the GGUF file to read, or None for a folder of safetensors."""
    if path.is_file():
        return path
    if (
        any(file.name != ADAPTER_FILE for file in path.glob("*.safetensors"))
        or (path / "model.safetensors.index.json").is_file()
    ):
        return None
    files = sorted(path.glob("*.gguf"))
    if not files:
        pickles = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt")])
        hint = (
            f" ({pickles[0]} is a pickle and is not read; save it as safetensors)"
            if pickles
            else ""
        )
        raise CheckpointError(f"{path} holds neither safetensors nor a GGUF file{hint}")
    if len({re.sub(r"-\d{5}(?=-of-\d{5}$)", "", file.stem) for file in files}) > 1:
        raise CheckpointError(f"{path} holds several GGUF files; name one of them as the model")
    return files[0]


def _is_tied(files: SafetensorsFiles, family: str, config_ties: bool) -> bool:
    """Return True if the head is the embedding, after giving both their family's names."""
    names = families.FAMILIES[family].names
    head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
    stored = files.names()
    if head not in stored and _HEAD in stored:  # transformers' name of any head in memory
        files.rename(_HEAD, head)
    if config_ties and embedding not in stored and head in files.names():  # either is both
        files.rename(head, embedding)
    if config_ties and {head, embedding} <= files.names():  # the weights overrule the config
        return torch.equal(files.read(head).float(), files.read(embedding).float())
    if not config_ties and head not in files.names():
        raise CheckpointError(
            f"{files.paths[0].parent} has no tensor {head}, and its config ties no head to the embedding"
        )
    return config_ties


def _config(folder: Path) -> dict[str, Any]:
    """Read `config.json` with the defaults of its model type filled in by transformers.

    The result is cached: transformers' configurations import all of its models, which would take a
    third of the time to the first output.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it says what kind of model this is")
    with _naming(path):
        families.check(read_json(path))
    key = importlib.metadata.version("transformers").encode() + b"\0" + path.read_bytes()
    name = f"{hashlib.sha256(key).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, CheckpointError):  # no cache, not there, or damaged
        return read_json(cache_folder() / "configs" / name)
    from transformers import AutoConfig

    with _naming(path), tokenizer.quiet_transformers():
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        filled: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # A cache that cannot be written does not matter, nor a lone surrogate, which is no UTF-8.
    with contextlib.suppress(OSError, UnicodeEncodeError):
        configs = cache_folder() / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        replace_json(configs / name, filled)
    return filled


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an exception about values into one line that names the file they are from."""
    try:
        yield
    except (CheckpointError, UnsupportedModelError):
        raise
    except Exception as error:  # transformers validates with exceptions of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be used: {reason}") from error


def read(files: Files, name: str, order: Literal["halves", "interleaved"]) -> Tensor:
    """Read a tensor of a checkpoint; rows of Q and K in the requested rotary layout."""
    tensors, head_dim = files.tensors, files.architecture.head_dim
    tensor = tensors.read(name)
    if tensors.rotary_layout == order or name.rsplit(".", 2)[-2] not in ("q_proj", "k_proj"):
        return tensor
    if order == "interleaved":
        return interleave(tensor, head_dim, head_dim)
    # The inverse: neighbours (2i, 2i+1) to halves (i, i + head_dim/2).
    pairs = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
