"""`DecodingConfig`: every option of decoding, spelled once."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from layerskip.decoding.constraint import schema_text
from layerskip.decoding.drafters import DRAFTERS
from layerskip.decoding.sampling import Sampling
from layerskip.model import CheckpointSettings
from layerskip.options import check_options, integer, option

MODES = ("plain", "early-exit", "self-speculative")
DRAFT_SOURCES = ("early-exit", "n-gram", "both")
DEFAULT_DRAFT_TOKENS = 5
MAX_ADAPTIVE_DRAFT_TOKENS = 31  # with the token before them 32 positions, whose cost is timed
MAX_PREDICTION = 1 << 24  # characters or tokens
MAX_GRAMMAR = 1 << 16  # characters of a JSON schema or regular expression
# Options that are token ids, or a value of these types.
_TOKEN_IDS_OR = {"draft_vocabulary": int, "datastore": str | Path, "prediction": str}
# Names that options had before.
ALIASES = {"draft_text": "datastore"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig(Sampling):
    """Options of one answer, from Python, the command line, a benchmark or a server alike.

    None leaves an option to the checkpoint and the mode; `resolve` fills it in.

    Raises:
        ValueError: a value is out of range, or values contradict each other.
    """

    mode: str = option(
        "auto",
        "Decoding mode; auto drafts from every source that is worth its cost here.",
        choices=("auto", *MODES),
    )
    exit_layer: int | None = option(
        None,
        "Number of layers that run before the early exit (E, 1 to the number of layers).",
        metavar="E",
    )
    draft_tokens: int | None = option(
        None,
        "Number of tokens to draft in a round; the maximum where drafts are adaptive.",
        at_least=0,
        metavar="D",
    )
    draft_from: str | None = option(
        None,
        "Source of drafts: early-exit, n-gram (of prompt and answer), both, or exit-adapter; a"
        " prediction is added.",
        metavar="SOURCE",
    )
    adaptive: bool | None = option(
        None, "End each draft where another token is not worth its cost (the default in auto)."
    )
    draft_vocabulary: int | tuple[int, ...] | None = option(
        None,
        "Number of tokens that the early exit may draft besides those of the prompt; 0 = all.",
        at_least=0,
        metavar="N",
        repr=False,
    )
    datastore: str | Path | tuple[int, ...] | None = option(
        None,
        "Text (or a table made by `layerskip index`) that resembles the answers: an n-gram datastore.",
        flags=("--datastore", "--draft-text"),
        metavar="TEXT|FILE",
        repr=False,
    )
    prediction: str | tuple[int, ...] | None = option(
        None,
        "Text that much of the answer is predicted to be, such as a file before an edit.",
        metavar="FILE|-",
        repr=False,
    )
    json_schema: str | Mapping[str, Any] | None = option(
        None,
        "JSON schema of the answer, on one line (constrained decoding).",
        metavar="FILE",
        repr=False,
    )
    regex: str | None = option(
        None,
        "Regular expression that the whole answer matches (constrained decoding).",
        metavar="REGEX",
        repr=False,
    )
    max_new_tokens: int = option(256, "Maximum number of new tokens.", at_least=1, metavar="N")
    seed: int | None = option(
        None,
        "Seed of sampling.",
        at_least=-(2**63),
        at_most=2**64 - 1,
    )
    stop: tuple[str, ...] = option(
        (), "Text that ends the answer and is not part of it (repeatable).", metavar="TEXT"
    )
    ignore_eos: bool = option(False, "Continue after an end-of-sequence token.")

    def __post_init__(self) -> None:
        stop: Any = self.stop
        stop = (stop,) if isinstance(stop, str) else stop or ()
        if not isinstance(stop, Collection) or not all(isinstance(s, str) and s for s in stop):
            raise ValueError("a stop string has to be a text that is not empty")
        object.__setattr__(self, "stop", tuple(stop))
        for name, other_types in _TOKEN_IDS_OR.items():
            value = getattr(self, name)
            if value is not None and not isinstance(value, other_types):
                object.__setattr__(self, name, _token_ids(name, value))
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        check_options(self)
        self._check_consistency()

    def _check_consistency(self) -> None:
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise ValueError("a stop string has to be a text that is not empty")
        if self.draft_from is not None:
            for source in self.draft_sources:
                if source not in DRAFTERS:
                    sources = ", ".join(dict.fromkeys((*DRAFT_SOURCES, *DRAFTERS)))
                    raise ValueError(
                        f"drafts from {self.draft_from!r} are unknown; there are: {sources}"
                    )
        if self.prediction and len(self.prediction) > MAX_PREDICTION:
            raise ValueError(
                f"the prediction has {len(self.prediction)} characters or tokens, the limit is"
                f" {MAX_PREDICTION}; shorten it"
            )
        self._check_grammar()
        drafting = bool(self.adaptive or self.draft_vocabulary or self.datastore or self.prediction)
        drafting = drafting or not (self.draft_tokens is None is self.draft_from)
        if self.mode == "plain" and (self.exit_layer is not None or drafting):
            raise ValueError(
                "plain decoding drafts nothing; leave out the exit layer and all options of drafts"
            )
        if self.mode == "early-exit" and drafting:
            raise ValueError("early exit drafts nothing; leave out all options of drafts")
        uses_exit = self.draft_from is None or "early-exit" in self.draft_sources
        if not uses_exit and (self.exit_layer is not None or self.draft_vocabulary):
            raise ValueError(
                "drafts without the early exit have no exit layer or draft vocabulary; leave them"
                " out, or draft from both"
            )
        exit_alone = self.draft_from == "early-exit" or (
            self.draft_from is None and self.mode != "auto"
        )
        if self.datastore and exit_alone:
            raise ValueError(
                "a datastore is searched for n-grams; draft from n-grams, or from both"
            )

    def _check_grammar(self) -> None:
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("an answer follows a JSON schema or a regular expression, not both")
        for name, text in (("JSON schema", self.json_schema), ("regular expression", self.regex)):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"the {name} is {text!r}, it has to be a text")
            if text is not None and len(text) > MAX_GRAMMAR:
                raise ValueError(
                    f"the {name} has {len(text)} characters, the limit is {MAX_GRAMMAR}; shorten it"
                )
        if self.is_constrained and self.ignore_eos:
            raise ValueError(
                "an answer with a grammar ends where the grammar does; leave ignore_eos out"
            )

    @property
    def is_constrained(self) -> bool:
        """True where a grammar says what the answer may be."""
        return self.json_schema is not None or self.regex is not None

    @classmethod
    def from_options(
        cls, config: "DecodingConfig | None", overrides: Mapping[str, Any]
    ) -> "DecodingConfig":
        """Return a config with some options replaced.

        Raises:
            ValueError: an option is unknown, or a value is invalid.
        """
        options = {ALIASES.get(name, name): value for name, value in overrides.items()}
        names = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in names:
                raise ValueError(
                    f"the option {name!r} is unknown; there are: {', '.join(sorted(names))}"
                )
        return dataclasses.replace(config or cls(), **options)

    @property
    def draft_sources(self) -> tuple[str, ...]:
        """Names of the drafters in `draft_from`."""
        if self.draft_from is None:
            return ()
        return tuple(self.draft_from.replace("both", "early-exit+n-gram").split("+"))

    @property
    def reported_mode(self) -> str:
        """The mode, where drafts that need no early exit are "n-gram" (or the drafter's name)."""
        if self.mode == "self-speculative" and "early-exit" not in self.draft_sources:
            return self.draft_from or self.mode
        return self.mode

    def num_layers_to_run(self, num_hidden_layers: int) -> int:
        """Return how many layers decide every token: E in early exit, else all."""
        return (
            self.exit_layer if self.mode == "early-exit" and self.exit_layer else num_hidden_layers
        )

    def resolve(
        self,
        settings: CheckpointSettings,
        num_hidden_layers: int,
        *,
        vocab_size: int | None = None,
        eos_token_ids: Collection[int] = (),
        has_adapter: bool = False,
    ) -> "DecodingConfig":
        """Fill in all options that are open, from the checkpoint's settings and the mode.

        `auto` becomes self-speculative decoding with adaptive drafts: from n-grams, and from an exit
        adapter where the model has one, or else from the early exit where the checkpoint or the caller
        names one, through the checkpoint's draft vocabulary. A prediction is always one more
        source; tokens that a grammar forces are one where no source was named.
        In the other modes nothing is on that was not asked for; an open exit layer is the checkpoint's,
        else a quarter of the layers. A resolved config resolves to itself.

        Args:
            settings: of the checkpoint.
            num_hidden_layers: L.
            vocab_size: V, for a draft vocabulary that is given as a number of tokens.
            eos_token_ids: tokens that a draft vocabulary always has.
            has_adapter: the model has an exit adapter.

        Raises:
            ValueError: the exit layer or draft vocabulary does not fit the model.
        """
        e = self.exit_layer
        if e is not None and not 1 <= e <= num_hidden_layers:
            raise ValueError(
                f"exit layer {e} is out of range: this model has 1 to {num_hidden_layers}"
            )
        if self.mode == "plain":
            return self
        default_exit = e if e is not None else settings.exit_layer
        auto = self.mode == "auto"
        draft_from = self.draft_from
        if draft_from is None:
            alone = auto and default_exit is None and not self.draft_vocabulary
            draft_from = "n-gram" if alone else "both" if auto else "early-exit"
            if auto and has_adapter and e is None and not self.draft_vocabulary:
                draft_from = "exit-adapter+n-gram"
            if auto and self.is_constrained:
                draft_from = f"grammar+{draft_from}"
        sources = dataclasses.replace(self, draft_from=draft_from, mode="auto").draft_sources
        if self.prediction and "prediction" not in sources:
            draft_from = f"prediction+{draft_from}"
        if "prediction" in sources and not self.prediction:
            raise ValueError("there is no prediction to draft from; give one, or another source")
        if "grammar" in sources and not self.is_constrained:
            raise ValueError("there is no grammar to draft from; give a JSON schema or a regex")
        uses_exit = "early-exit" in sources
        if uses_exit and default_exit is not None and default_exit > num_hidden_layers:
            raise ValueError(
                f"the checkpoint's exit layer is {default_exit}, but it has {num_hidden_layers} layers;"
                " name another"
            )
        exit_layer = default_exit if default_exit is not None else max(1, num_hidden_layers // 4)
        if self.mode == "early-exit":
            return dataclasses.replace(self, exit_layer=exit_layer)
        adaptive = auto if self.adaptive is None else self.adaptive
        draft_tokens = self.draft_tokens
        if draft_tokens is None:
            draft_tokens = settings.draft_tokens or DEFAULT_DRAFT_TOKENS
            if adaptive:
                draft_tokens = max(draft_tokens, MAX_ADAPTIVE_DRAFT_TOKENS)
        vocabulary = self.draft_vocabulary
        if vocabulary is None and auto and uses_exit:
            vocabulary = settings.draft_vocabulary
        vocabulary = _fit_vocabulary(vocabulary or None, settings, vocab_size, eos_token_ids)
        datastore = self.datastore
        if datastore is None and auto and draft_from != "early-exit":
            datastore = settings.draft_text_file or settings.draft_text
        return dataclasses.replace(
            self,
            mode="self-speculative",
            exit_layer=exit_layer if uses_exit else None,
            draft_tokens=draft_tokens,
            draft_from=draft_from,
            adaptive=adaptive,
            draft_vocabulary=vocabulary,
            datastore=datastore or None,
            prediction=self.prediction or None,
        )

    def plain(self) -> "DecodingConfig":
        """Return the same config for plain decoding."""
        return dataclasses.replace(
            self,
            mode="plain",
            exit_layer=None,
            draft_tokens=None,
            draft_from=None,
            adaptive=None,
            draft_vocabulary=None,
            datastore=None,
            prediction=None,
        )

    def to_row(self) -> dict[str, Any]:
        """Return the options as a benchmark's row or a JSON file shows them."""
        row = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        vocabulary, datastore = self.draft_vocabulary, self.datastore
        row["draft_vocabulary"] = len(vocabulary) if isinstance(vocabulary, tuple) else vocabulary
        row["datastore"] = str(datastore) if isinstance(datastore, Path) else bool(datastore)
        row["prediction"] = bool(self.prediction) or "prediction" in self.draft_sources
        return row


def _fit_vocabulary(
    vocabulary: int | tuple[int, ...] | None,
    settings: CheckpointSettings,
    vocab_size: int | None,
    always: Collection[int],
) -> tuple[int, ...] | None:
    """Return the token ids of a draft vocabulary in their order, those it always has at the end."""
    if isinstance(vocabulary, int):
        vocabulary = (settings.draft_vocabulary or tuple(range(vocab_size or 0)))[:vocabulary]
    if not vocabulary or vocab_size is None:
        return vocabulary or None
    if min(vocabulary) < 0 or max(vocabulary) >= vocab_size:
        raise ValueError(
            f"the draft vocabulary has to be 1 or more tokens, of 0 to {vocab_size - 1}"
        )
    missing = {token for token in always if token < vocab_size}.difference(vocabulary)
    return (*vocabulary, *sorted(missing)) if missing else vocabulary


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    # Every `dataclasses.replace` comes here, with up to many thousand tokens.
    if type(value) is tuple and {*map(type, value)} <= {int}:
        return value
    try:
        return tuple(integer(name, token) for token in value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, it has to be token ids") from None
