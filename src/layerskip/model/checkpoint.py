"""The order of the rows of Q and K: transformers' halves, or the neighbours of some GGUF files.

What is known of a checkpoint's quality in 8 and 4 bits, and what to say where that is little.

It stands in `generation_config.json`, key `layerskip`, field `weights`: {"int4": {"method": ...,
"nll_change": ...}}. Measuring takes the model in 16 bits too, so it is done where the checkpoint is
written, and loading only reads what was found.

The settings that travel with a checkpoint, in `generation_config.json`.

What transformers has a field for is in that field. The rest is under the key `layerskip`: `exit_layer`,
for models that transformers cannot draft with, whose `generate` would fail with its own field;
`draft_vocabulary`, token ids in one text, the most useful first; `draft_text`, token ids of what answers
repeat; `costs`, a list of `StepCosts`.

The checkpoints that the paper's authors published, and where they exit best, as far as is known.

Their files name no exit layer. Sources: the paper (arXiv 2404.16710), its tables for summarization on
CNN/DM; and the article on these checkpoints at huggingface.co/blog/layerskip, which gives an exit layer
for summarization and no draft length.
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
from layerskip.model import decoder as rotary
from layerskip.model import families, tokenizer
from layerskip.model import loader as assembly
from layerskip.model import tokenizer as gguf_tokenizer
from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.decoder import Decoder
from layerskip.model.weights import GgufFile, SafetensorsFiles, Tensors
from layerskip.paths import cache_folder

CALIBRATED = "calibration"
FIELD = "weights"
MOST_CHANGE = 0.05  # of the negative log-likelihood; above it a load says so
_FOUR_BITS = ("Q4_0", "Q4_1")  # which loading takes over


class RoundingWarning(UserWarning):
    """Loading in 8 or 4 bits costs quality, or may."""


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How a checkpoint came to its rounded weights, and what they cost.

    Attributes:
        method: `CALIBRATED`.
        nll_change: of the calibration text's held-out part, against the same weights in bfloat16,
            0.02 = 2% more; None where it was not measured.
    """

    method: str
    nll_change: float | None = None


def recorded(own: Any, known: Mapping[str, Rounding]) -> dict[str, Any]:
    """The `layerskip` object of `generation_config.json` with what is known now, and nothing older.

    Args:
        own: the object so far, if there is one.
        known: "int8" or "int4" to what is known of it.
    """
    rest = {k: v for k, v in own.items() if k != FIELD} if isinstance(own, dict) else {}
    if known:
        rest[FIELD] = {name: dataclasses.asdict(rounding) for name, rounding in known.items()}
    return rest


def warn_of_rounding(path: Path, tensors: Tensors, weights: str) -> None:
    """Warn (`RoundingWarning`) of what is known, or not known, of a checkpoint in these bits.

    Eight bits that nobody measured are not doubted, since rounding to them is harmless; nor are four
    where every matrix of the layers is stored in them, as in some GGUF files, since nothing is rounded.

    Args:
        path: a checkpoint.
        tensors: what it holds.
        weights: a key of `quantize.WEIGHTS`.
    """
    if weights == "16bit" or (weights == "int4" and _is_in_four_bits(tensors)):
        return
    line = _doubt(path / FILE, weights)
    if line is not None:
        warnings.warn(line, RoundingWarning, stacklevel=4)  # whoever loads a `LayerSkipModel`


def _is_in_four_bits(tensors: Tensors) -> bool:
    matrices = [n for n in tensors.names() if ".layers." in n and len(tensors.shape(n)) == 2]
    return all(tensors.stored_as(name) in _FOUR_BITS for name in matrices)


def _doubt(file: Path, weights: str) -> str | None:
    own = read_json(file).get(KEY) if file.is_file() else None
    known = own.get(FIELD) if isinstance(own, dict) else None
    found = known.get(weights) if isinstance(known, dict) else None
    if not isinstance(found, dict):
        if weights == "int8":
            return None
        return (
            "what 4 bits cost this checkpoint is not known, and may be much; `layerskip export --to hf"
            " --weights int4 --calibrate TEXT` measures it and makes it less"
        )
    change = found.get("nll_change")
    if isinstance(change, float) and not change <= MOST_CHANGE:  # nor is it, where it is no number
        return (
            f"{weights} costs this checkpoint {change:.0%} negative log-likelihood on the text that it"
            " was measured with; --weights int8 costs less"
        )
    return None


FILE = "generation_config.json"
DRAFT_TEXT_FILE = "draft_text.table"  # no *.safetensors, which other tools would take for weights
KEY = "layerskip"
EXIT = "exit_layer"  # under that key


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCosts:
    """What decoding costs on some machine, measured in plain steps of one token.

    Attributes:
        dtype: of the weights that were timed, such as "bfloat16".
        weights: how they were kept, such as "16bit".
        device: "cpu" or "cuda".
        kernels: what ran the layers, see `Decoder.kernels`.
        machine: where, see `machine.machine`; "" is none that is known.
        threads: of the CPU; 0 is not known.
        exit_layer: E of the drafts that were timed.
        draft_step: the first E layers and the draft's head over one token.
        draft_tokens_scored: how many tokens that head has.
        head: final norm, whole head and choice, for one token.
        passes: all layers and the head over 1, 2, ... positions; the first is 1.
        overhead: of a round, beside its parts.
        context: positions that attention looked back on meanwhile; 0 is few, or not known.
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
        """What costs depend on most: dtype, weights, device, kernels, machine."""
        return self.dtype, self.weights, self.device, self.kernels, self.machine

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON, in four digits."""
        fields = dataclasses.asdict(self)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in fields.items()}
        return shown | {"passes": " ".join(f"{cost:.4f}" for cost in self.passes)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "StepCosts":
        """What `to_dict` gave; raises AttributeError, KeyError, TypeError or ValueError for others."""
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


# Fields of generation_config.json that change greedy answers too -> the value that changes nothing.
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


class SettingsWarning(UserWarning):
    """A setting that cannot be read, and that is done without."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """What `generation_config.json` says about decoding.

    `exit_layer` is `assistant_early_exit`, or where that is not there ours; `draft_tokens` is
    `num_assistant_tokens`.
    `draft_vocabulary` are the tokens that an early exit drafts, the most useful first; None = all.
    `draft_text` is searched for n-grams, beside prompt and answer; `draft_text_file`, which lies beside
    the weights, holds the table of a longer one and takes its place.
    `costs` were measured, one for each kind of weights and machine that the model was tuned with.
    """

    end_tokens: tuple[int, ...] = ()
    exit_layer: int | None = None
    draft_tokens: int | None = None
    draft_vocabulary: tuple[int, ...] | None = None
    draft_text: tuple[int, ...] | None = None
    draft_text_file: Path | None = None
    costs: tuple[StepCosts, ...] = ()

    def measured_for(self, *kind: str, threads: int = 0) -> "CheckpointSettings":
        """The same without costs that were measured for another `StepCosts.kind` or other threads."""
        costs = [c for c in self.costs if c.kind == kind and c.threads in (0, threads)]
        costs.sort(key=lambda c: c.threads, reverse=True)
        return dataclasses.replace(self, costs=tuple(costs))

    @property
    def measured(self) -> StepCosts | None:
        """The costs that hold for a loaded model, whose settings went through `measured_for`."""
        return self.costs[0] if self.costs else None


def read_settings(path: Path, config: dict[str, Any], vocab_size: int) -> CheckpointSettings:
    """`generation_config.json` where there is one; the end token falls back on the config's.

    Raises:
        CheckpointError: a field has a value that it cannot have.
    """
    file = path / FILE
    fields = read_json(file) if path.is_dir() and file.is_file() else {}
    ends = fields.get("eos_token_id", config.get("eos_token_id"))
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if any(type(token) is not int or token < 0 for token in ends):
        raise CheckpointError(
            f"eos_token_id is {ends} in {file} (or config.json), token ids are needed"
        )
    ends = [token for token in dict.fromkeys(ends) if token < vocab_size]  # others never come
    _warn_of_what_has_no_effect(fields, file)
    own = fields.get(KEY)
    own = own if isinstance(own, dict) else {}
    vocabulary = _token_ids(own, "draft_vocabulary", vocab_size, file)
    if vocabulary is not None:  # an answer's end can be drafted too
        vocabulary = tuple(dict.fromkeys((*vocabulary, *ends)))
    return CheckpointSettings(
        end_tokens=tuple(ends),
        exit_layer=exit_layer_of(fields, file),
        draft_tokens=_positive_int(fields, "num_assistant_tokens", file),
        draft_vocabulary=vocabulary,
        draft_text=_token_ids(own, "draft_text", vocab_size, file),
        draft_text_file=_draft_text_file(path),
        costs=costs_of(own, file),
    )


def _draft_text_file(path: Path) -> Path | None:
    file = path / DRAFT_TEXT_FILE
    if not file.is_file():
        return None
    check_within(file, is_read=True)
    return file


def exit_layer_of(fields: dict[str, Any], file: Path) -> int | None:
    """The exit that the fields of `generation_config.json` name, transformers' own field before ours.

    Raises:
        CheckpointError: it is no whole number above 0.
    """
    own = fields.get(KEY)
    named = _positive_int(fields, "assistant_early_exit", file)
    return named or _positive_int(own if isinstance(own, dict) else {}, EXIT, file)


def _warn_of_what_has_no_effect(fields: dict[str, Any], file: Path) -> None:
    """What changes even a greedy answer of transformers, and no answer here."""
    found = [
        f"{name} {fields[name]}"
        for name, off in _NOT_APPLIED.items()
        if fields.get(name, off) not in (off, None, [], {})
    ]
    if not found:
        return
    own = " (--repetition-penalty applies that)" if found[0].startswith("repetition") else ""
    warnings.warn(
        f"{file} names {', '.join(found)}, which transformers applies to greedy answers too and"
        f" layerskip does not{own}",
        SettingsWarning,
        stacklevel=2,
    )


def text_of_ids(token_ids: Iterable[int]) -> str:
    """Token ids as the one text in which they are kept: a list would fill thousands of lines."""
    return " ".join(map(str, token_ids))


def _positive_int(fields: dict[str, Any], key: str, file: Path) -> int | None:
    value = fields.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 1:  # a bool is an int too
        raise CheckpointError(f"{key} in {file} is {value!r}, a whole number above 0 is needed")
    return value


def _token_ids(
    own: dict[str, Any], key: str, vocab_size: int, file: Path
) -> tuple[int, ...] | None:
    text = own.get(key)
    if not text:
        return None
    try:
        ids = tuple(int(word) for word in text.split())
    except (AttributeError, ValueError):
        ids = (-1,)
    if min(ids, default=-1) < 0 or max(ids) >= vocab_size:
        warnings.warn(
            f"{key} in {file} has to be token ids of 0 to {vocab_size - 1} with spaces between them;"
            " going on without: tune again",
            SettingsWarning,
            stacklevel=2,
        )
        return None
    return ids


def costs_of(own: dict[str, Any], file: Path) -> tuple[StepCosts, ...]:
    """The costs under our key in `generation_config.json`; a warning says which cannot be read."""
    costs = []
    for fields in entries_of(own):
        found = readable_costs(fields)
        if isinstance(found, StepCosts):
            costs.append(found)
        else:
            warnings.warn(
                f"costs in {file} cannot be read ({found}); going on without: tune again",
                SettingsWarning,
                stacklevel=2,
            )
    return tuple(costs)


def entries_of(own: dict[str, Any]) -> list[Any]:
    """The costs as they stand under our key, of which some may be unreadable here."""
    found = own.get("costs") or []
    return found if isinstance(found, list) else [found]


def readable_costs(fields: Any) -> StepCosts | Exception:
    """Costs, or why they are none: damaged, or of another version."""
    try:
        return StepCosts.from_dict(fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return error


def special_tokens(config: Mapping[str, Any], end_tokens: Collection[int]) -> dict[str, Any]:
    """What transformers takes from `config.json` while there is no file of settings."""
    names = ("bos_token_id", "pad_token_id")
    fields = {name: config[name] for name in names if config.get(name) is not None}
    ends = list(end_tokens)
    return fields | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


# An exit layer E and a draft length d, as far as a source gives them.
PUBLISHED = {
    "facebook/layerskip-llama2-7B": CheckpointSettings(exit_layer=8, draft_tokens=12),  # the paper
    "facebook/layerskip-llama2-13B": CheckpointSettings(
        exit_layer=15, draft_tokens=12
    ),  # the paper
    "facebook/layerskip-llama2-70B": CheckpointSettings(exit_layer=10),  # the article
    "facebook/layerskip-codellama-7B": CheckpointSettings(),
    "facebook/layerskip-codellama-34B": CheckpointSettings(),
    "facebook/layerskip-llama3-8B": CheckpointSettings(exit_layer=4),  # the article
    "facebook/layerskip-llama3.2-1B": CheckpointSettings(exit_layer=4),  # the article
}


def with_defaults(name: str, settings: CheckpointSettings) -> CheckpointSettings:
    """A checkpoint's settings; what they leave open of a published one is filled in.

    Args:
        name: what the checkpoint was loaded by; only a hub id of `PUBLISHED` changes anything.
        settings: what its own files say.
    """
    known = PUBLISHED.get(name)
    if known is None or settings.exit_layer is not None:
        return settings
    draft_tokens = settings.draft_tokens or known.draft_tokens
    return dataclasses.replace(settings, exit_layer=known.exit_layer, draft_tokens=draft_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` returns; `tokenizer` is None where the checkpoint has no tokenizer files."""

    path: Path
    decoder: Decoder
    tokenizer: Any
    settings: CheckpointSettings


_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """What `open_files` returns: everything but the weights, which `tensors` reads one at a time.

    `config` is transformers' config with its defaults filled in; of a GGUF file, the end tokens alone.
    `tied` says that the head is the embedding.
    """

    path: Path
    architecture: Architecture
    tensors: Tensors
    config: dict[str, Any]
    tied: bool
    settings: CheckpointSettings

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None (see `tokenizer.load`)."""
        return tokenizer.load(self.path, self._gguf_file)

    def write_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files into a folder (see `tokenizer.write`)."""
        tokenizer.write(self.path, folder, self._gguf_file)

    def names(self) -> set[str]:
        """The tensors that make the model: no head that is the embedding, no copies of the config."""
        names = families.FAMILIES[self.architecture.family].names
        left_out = {f"{names.head}.weight"} if self.tied else set()
        return {n for n in self.tensors.names() - left_out if not n.endswith(names.ignored)}

    @property
    def _gguf_file(self) -> GgufFile | None:
        return self.tensors if isinstance(self.tensors, GgufFile) else None


def load(
    path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    weights: str = "16bit",
    compiled: bool | Callable[[Architecture], bool] = False,
) -> Checkpoint:
    """Load a checkpoint folder (safetensors, or one GGUF file in it) or a GGUF file.

    `dtype` None is `assembly.fast_dtype`; `weights` says how the decoder keeps them, a key of
    `quantize.WEIGHTS`; `compiled`, whether it may run in the kernels of `native`, which have to be
    prepared, or on a GPU through `torch_compile`; or what decides that.

    Raises:
        CheckpointError: files are missing, damaged, or do not fit together.
        UnsupportedModelError: the architecture, or a part of it, is not supported; it is named.
        ValueError: `weights` is unknown.

    Warns:
        RoundingWarning: what `weights` cost this checkpoint is much or not known.
    """
    files = open_files(path)
    warn_of_rounding(path, files.tensors, weights)
    compiled = compiled(files.architecture) if callable(compiled) else compiled
    if dtype is None:
        dtype = assembly.fast_dtype(files.architecture, torch.device(device), compiled)
    return Checkpoint(
        path=path,
        decoder=assembly.build(
            files.architecture,
            files.tensors,
            tied=files.tied,
            dtype=dtype,
            device=device,
            weights=weights,
            compiled=compiled,
        ),
        tokenizer=files.tokenizer(),
        settings=files.settings,
    )


def open_files(path: Path) -> Files:
    """Open what `load` loads, without reading weights; raises what `load` raises."""
    check_no_adapter(path)
    gguf_path = _gguf_in(path)
    tensors: Tensors
    if gguf_path is not None:
        tensors = file = GgufFile(gguf_path)
        with _unusable_named(file.path):
            architecture = file.architecture()
            config: dict[str, Any] = {"eos_token_id": gguf_tokenizer.end_tokens(file)}
        tied = _HEAD not in tensors.names()
    else:
        config = _config(path)
        with _unusable_named(path / "config.json"):
            architecture = families.from_config(config)
        tensors = files = SafetensorsFiles(path)
        names = families.FAMILIES[architecture.family].names
        head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
        tied = bool(config.get("tie_word_embeddings"))
        found = files.names()
        if head not in found and _HEAD in found:  # in memory transformers has it so in every family
            files.rename(_HEAD, head)
        if tied and embedding not in found and head in files.names():  # either may stand for both
            files.rename(head, embedding)
        if tied and {head, embedding} <= tensors.names():  # the numbers say more than the config
            tied = torch.equal(tensors.read(head).float(), tensors.read(embedding).float())
        if not tied and head not in tensors.names():
            raise CheckpointError(
                f"{path} has no tensor {head}, and its config ties no head to the embedding"
            )
    return Files(
        path=path,
        architecture=architecture,
        tensors=tensors,
        config=config,
        tied=tied,
        settings=read_settings(path, config, architecture.vocab_size),
    )


def check_no_adapter(folder: Path) -> None:
    """Refuse an adapter, as peft writes it, alone or beside weights.

    transformers would put one that lies beside weights on, be it a pickle; we do not.

    Raises:
        UnsupportedModelError: there is one; where it is alone, its base is named if it is known.
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
    named = f", {base}," if base else ""
    raise UnsupportedModelError(
        f"{folder} is a LoRA adapter; merge it into its base{named} first (peft's merge_and_unload)"
    )


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file to read, or None where the folder holds safetensors."""
    if path.is_file():
        return path
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if not files:
        others = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt")])
        hint = (
            f" ({others[0]} is a pickle and is not read; save it as safetensors)" if others else ""
        )
        raise CheckpointError(f"{path} holds neither safetensors nor a GGUF file{hint}")
    if len(files) > 1 and all(re.search(r"-\d{5}-of-\d{5}$", file.stem) for file in files):
        raise CheckpointError(
            f"{path} holds a GGUF file in parts; join them with llama-gguf-split --merge"
        )
    if len(files) > 1:
        raise CheckpointError(f"{path} holds several GGUF files; name one of them as the model")
    return files[0]


def _config(folder: Path) -> dict[str, Any]:
    """`config.json` with the defaults of its model type filled in by transformers.

    Kept in the cache: transformers' configurations import all of its modelling, which would take a third
    of the time to a first answer.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it says what kind of model this is")
    stored = read_json(path)
    families.family_of(str(stored.get("model_type")))
    with _unusable_named(path):  # before transformers makes something for each of them
        families.check_n_layers(int(stored.get("num_hidden_layers", 1)))
    depends_on = importlib.metadata.version("transformers").encode() + b"\0" + path.read_bytes()
    name = f"{hashlib.sha256(depends_on).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, CheckpointError):  # no cache, not there, or damaged
        return read_json(cache_folder() / "configs" / name)
    from transformers import AutoConfig

    with _unusable_named(path):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        filled: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # A cache that cannot be written is no reason to stop, nor is half an emoji, which is no UTF-8.
    with contextlib.suppress(OSError, UnicodeEncodeError):
        configs = cache_folder() / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        replace_json(configs / name, filled)
    return filled


@contextlib.contextmanager
def _unusable_named(path: Path) -> Iterator[None]:
    """Turn a complaint about values into one line that names the file they are from."""
    try:
        yield
    except (CheckpointError, UnsupportedModelError):
        raise
    except Exception as error:  # transformers validates with error types of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be used: {reason}") from error


def read(files: Files, name: str, order: Literal["halves", "interleaved"]) -> Tensor:
    """A tensor of a checkpoint, its rows in the order that is asked for where it is one of Q or K."""
    tensors, head_dim = files.tensors, files.architecture.head_dim
    tensor = tensors.read(name)
    if tensors.rotary_layout == order or name.rsplit(".", 2)[-2] not in ("q_proj", "k_proj"):
        return tensor
    if order == "interleaved":
        return rotary.interleave(tensor, head_dim, head_dim)
    return _separate(tensor, head_dim)


def _separate(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `rotary.interleave`: neighbours (2i, 2i+1) to halves (i, i + head_dim/2)."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
