"""Options of a benchmark, its rows, and this package as one of the systems that are measured."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layerskip.bench.baselines import BASELINES
from layerskip.bench.machine import PeakMemory, weight_bytes_read
from layerskip.bench.measure import Run, Setting
from layerskip.decoding import (
    DRAFT_SOURCES,
    MODES,
    Answer,
    DecodingConfig,
    LayerSkipModel,
    Sampling,
    register_drafter,
)
from layerskip.decoding.datastore import Datastore
from layerskip.decoding.drafters import DatastoreLookup, Drafter, DrafterInputs
from layerskip.decoding.sampling import nth_seed
from layerskip.export import GGUF_WEIGHTS
from layerskip.options import option

BENCH_MODES = (*MODES, "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(Sampling):
    """Options of a benchmark.

    Raises:
        ValueError: a value is unknown or out of range, or baselines and sampling are combined.
    """

    task: str = option(
        "",
        "A task's name (see docs/how-to/bench.md), or a .jsonl or text file of prompts.",
        metavar="T",
    )
    data: str | None = option(
        None, "Folder of the data sets; also LAYERSKIP_DATA.", metavar="FOLDER"
    )
    samples: int = option(20, "Number of prompts.", at_least=1, metavar="N")
    n_shot: int | None = option(
        None, "Number of worked examples before each prompt.", at_least=0, metavar="N"
    )
    seed: int = option(
        0,
        "Seed of the choice of prompts, and of sampling.",
        at_least=-(2**63),
        at_most=2**64 - 1,
    )
    modes: tuple[str, ...] = option(
        BENCH_MODES,
        "Modes to measure; plain is always among them.",
        choices=BENCH_MODES,
        flags=("--modes", "--mode"),
        metavar="MODE,...",
    )
    exit_layers: tuple[int, ...] = option(
        (),
        "Exit layers of early exit and of drafts. Default: the checkpoint's, else a quarter.",
        at_least=1,
        flags=("--exit-layers", "--exit-layer"),
        metavar="4,8,12-20",
    )
    draft_tokens: tuple[int, ...] = option(
        (), "Draft lengths. Default: the checkpoint's, else 5.", at_least=0, metavar="D,..."
    )
    draft_from: tuple[str, ...] = option(
        ("early-exit",), f"Sources of drafts: {', '.join(DRAFT_SOURCES)}.", metavar="SOURCE,..."
    )
    draft_vocabulary: tuple[int, ...] = option(
        (),
        "Add rows whose early exit may draft only N tokens, through a reduced-vocabulary head.",
        at_least=1,
        metavar="N,...",
    )
    adaptive: bool = option(
        False,
        "Add a row for each exit layer whose drafts end where another token is not worth its cost.",
    )
    ablation: bool = option(
        False, "Add rows of auto without each of its parts, and with one part alone."
    )
    sources: bool = option(
        False, "Add a row of auto for each source of drafts alone, and one for all sources."
    )
    max_new_tokens: int | None = option(
        None,
        "Maximum number of new tokens. Default: the task's.",
        at_least=1,
        metavar="N",
    )
    repeats: int = option(1, "Number of passes over all prompts.", at_least=1, metavar="N")
    ignore_eos: bool = option(
        False, "Continue all answers up to --max-new-tokens; they are not scored."
    )
    allow_code_execution: bool = option(
        False,
        "Allow humaneval and mbpp to run the Python code that the model writes (docs/how-to/bench.md).",
    )
    baselines: tuple[str, ...] = option(
        (),
        f"Other programs on the same weights: {', '.join(BASELINES)}.",
        choices=BASELINES,
        flags=("--baselines", "--peers"),
        metavar="NAME,...",
    )
    gguf_weights: str | None = option(
        None,
        "Precision of the file for llama.cpp. Default: that of --weights and --dtype.",
        choices=tuple(GGUF_WEIGHTS),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baselines and self.sampling != Sampling():
            raise ValueError(
                "other systems answer greedily here: leave out the baselines, or what is about sampling"
            )
        for source in self.draft_from:
            DecodingConfig(draft_from=source)  # raises where it is unknown


class LayerSkipSystem:
    """`LayerSkipModel` as a system.

    Args:
        model: the model.
        settings: with resolved configs.
        predictions: token ids of a prompt -> its prediction, instead of the config's.
        watch: receives each answer before it is computed, and may iterate over it to show it.
    """

    name = "layerskip"

    def __init__(
        self,
        model: LayerSkipModel,
        settings: Sequence[Setting],
        *,
        predictions: Mapping[tuple[int, ...], str] | None = None,
        watch: Callable[[Setting, Answer], None] = lambda setting, answer: None,
    ) -> None:
        self.settings = settings
        self.memory = PeakMemory(model.decoder.device)
        self._model, self._watch, self._predictions = model, watch, predictions or {}

    def answer(self, setting: Setting, prompt: Sequence[int], max_new_tokens: int) -> Run:
        """See `System`. The seed depends on the prompt, and is the same in all rows."""
        self.memory.reset()
        seed = nth_seed(setting.config.seed, zlib.crc32(repr(list(prompt)).encode()))
        config = dataclasses.replace(setting.config, max_new_tokens=max_new_tokens, seed=seed)
        if _PREDICTION in config.draft_sources:
            prediction = self._predictions.get(tuple(prompt), config.prediction)
            config = dataclasses.replace(config, prediction=prediction)
        answer = self._model.answer(prompt, config)
        self._watch(setting, answer)
        generation = answer.complete()
        return Run(
            steps=generation.steps,
            text=generation.text,
            ttft_s=generation.ttft_s,
            decode_s=generation.decode_s,
            peak_memory_bytes=self.memory.read(),
            weight_bytes_read=weight_bytes_read(self._model.decoder, generation.steps[1:], config),
        )


# Options of auto in the rows of an ablation: without a part, or with one or two parts alone.
_ABLATION: dict[str, dict[str, Any]] = {
    "without n-grams": {"draft_from": "early-exit"},
    "without datastore": {"datastore": ()},
    "without early exit": {"draft_from": "n-gram"},
    "without reduced head": {"draft_vocabulary": 0},
    "without adaptive": {"adaptive": False},
    "early exit alone": {"draft_from": "early-exit", "draft_vocabulary": 0, "adaptive": False},
    "n-grams alone": {"draft_from": "n-gram", "datastore": (), "adaptive": False},
    "early exit and reduced head": {"draft_from": "early-exit", "adaptive": False},
    "early exit and adaptive": {"draft_from": "early-exit", "draft_vocabulary": 0},
}
_SOURCES: dict[str, dict[str, Any]] = {
    "drafts from early exit": {"draft_from": "early-exit"},
    "drafts from exit adapter": {"draft_from": "exit-adapter"},
    "drafts from n-grams": {"draft_from": "n-gram", "datastore": ()},
    "drafts from datastore": {"draft_from": "datastore"},
    "drafts from all sources": {},
}
_PREDICTION = "prediction"


def settings_of(
    model: LayerSkipModel,
    config: BenchConfig | None = None,
    *,
    stop: Sequence[str] = (),
    with_predictions: bool = False,
    **overrides: Any,
) -> list[Setting]:
    """Return the rows to measure: plain, early exit, self-speculative, auto, and variants of auto.

    Plain decoding is always the first row: the others are compared with it.

    Args:
        model: its checkpoint's settings fill in what the config leaves open.
        config: see `BenchConfig`.
        stop: texts that end an answer.
        with_predictions: whether there is a prediction of each answer.
        overrides: options that replace those of the config.

    Raises:
        ValueError: an option does not fit this model.
    """
    config = dataclasses.replace(config or BenchConfig(), **overrides)
    shared = dataclasses.asdict(config.sampling)
    shared |= {"seed": config.seed, "ignore_eos": config.ignore_eos, "stop": tuple(stop)}

    def setting(mode: str, label: str | None = None, **options: Any) -> Setting:
        resolved = model.resolve(DecodingConfig(mode=mode, **shared, **options))
        return Setting(config=resolved, mode="auto" if mode == "auto" else "", label=label)

    rows = [setting("plain")]
    exits = config.exit_layers or (None,)
    if "early-exit" in config.modes:
        rows += [setting("early-exit", exit_layer=e) for e in exits]
    if "self-speculative" in config.modes:
        rows += [setting("self-speculative", **options) for options in _drafting(config)]
    auto = setting("auto")
    if "auto" in config.modes:
        rows.append(auto)

    def variants(options: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
        settings = model.settings
        available = {
            "early-exit": settings.exit_layer is not None,
            "exit-adapter": model.adapter is not None,
            "datastore": bool(settings.draft_text or settings.draft_text_file),
        }
        return [
            setting("auto", label, **changes)
            for label, changes in options.items()
            if available.get(changes.get("draft_from", ""), True)
        ]

    if config.ablation:
        rows += _new(variants(_ABLATION), [*rows, auto])
    if config.sources:
        rows += _new(variants(_SOURCES), rows)
        if with_predictions:
            rows += _from_predictions(auto)
    return rows


def _from_predictions(auto: Setting) -> list[Setting]:
    """Return rows of auto that draft from a prediction alone, and from it beside all other sources."""
    beside = f"{_PREDICTION}+{auto.config.draft_from}"
    alone: dict[str, Any] = {"exit_layer": None, "draft_vocabulary": None, "datastore": None}
    return [
        dataclasses.replace(
            auto, config=dataclasses.replace(auto.config, **options), label=f"drafts from {label}"
        )
        for label, options in (
            ("prediction", {"draft_from": _PREDICTION, **alone}),
            ("prediction and all sources", {"draft_from": beside}),
        )
    ]


def _drafting(config: BenchConfig) -> list[dict[str, Any]]:
    """Return the options of each self-speculative row."""
    rows: list[dict[str, Any]] = []
    for source in config.draft_from:
        has_exit = "early-exit" in DecodingConfig(draft_from=source).draft_sources
        for e in (config.exit_layers or (None,)) if has_exit else (None,):
            row = {"draft_from": source, "exit_layer": e}
            for size in (None, *config.draft_vocabulary) if has_exit else (None,):
                lengths = config.draft_tokens or (None,)
                rows += [row | {"draft_vocabulary": size, "draft_tokens": d} for d in lengths]
            if config.adaptive and has_exit:
                rows.append(row | {"adaptive": True})
    return rows


def _new(settings: Sequence[Setting], rows: Sequence[Setting]) -> list[Setting]:
    """Return the settings that decode differently from those of auto that are there."""
    present = {row.config for row in rows if row.mode == "auto"}
    by_config: dict[DecodingConfig, Setting] = {}
    for setting in settings:
        if setting.config not in present:
            by_config.setdefault(setting.config, setting)
    return list(by_config.values())


def _datastore_alone(inputs: DrafterInputs) -> list[Drafter]:
    datastore = Datastore.of(inputs.datastore, inputs.decoder.architecture.vocab_size)
    return [] if datastore is None else [DatastoreLookup(datastore, inputs.eos_token_ids)]


register_drafter("datastore", _datastore_alone)
