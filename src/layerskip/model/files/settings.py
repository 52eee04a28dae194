"""The settings that travel with a checkpoint, in `generation_config.json`.

What transformers has a field for is in that field. The rest is under the key `layerskip`: `exit_layer`,
for models that transformers cannot draft with, whose `generate` would fail with its own field;
`draft_vocabulary`, token ids in one text, the most useful first; `draft_text`, token ids of what answers
repeat; `costs`, a list of `StepCosts`.
"""

import dataclasses
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from layerskip.model.files.json_files import CheckpointError, read_json
from layerskip.model.files.writing import check_within

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
class Settings:
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

    def measured_for(self, *kind: str, threads: int = 0) -> "Settings":
        """The same without costs that were measured for another `StepCosts.kind` or other threads."""
        costs = [c for c in self.costs if c.kind == kind and c.threads in (0, threads)]
        costs.sort(key=lambda c: c.threads, reverse=True)
        return dataclasses.replace(self, costs=tuple(costs))

    @property
    def measured(self) -> StepCosts | None:
        """The costs that hold for a loaded model, whose settings went through `measured_for`."""
        return self.costs[0] if self.costs else None


def read_settings(path: Path, config: dict[str, Any], vocab_size: int) -> Settings:
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
    return Settings(
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
