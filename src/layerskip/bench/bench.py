"""A benchmark of a model on a task, as one document; and the rows of an evaluation."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from layerskip.bench.baselines import BASELINES, start_baselines
from layerskip.bench.machine import environment_of, read_bandwidth
from layerskip.bench.measure import Entry, Setting, System, measure
from layerskip.bench.quality import Sample
from layerskip.bench.rows import is_echo, row
from layerskip.bench.systems import BENCH_MODES, BenchConfig, LayerSkipSystem, settings_of
from layerskip.bench.tasks import Task
from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.model.quantize import STORED

__all__ = ["BENCH_MODES", "BenchConfig", "Metric", "Row", "bench", "rows_of"]

N_EXITS = 4  # number of exits to evaluate by default: a quarter of the layers, a half, ... all
DRAFTING = ("auto", "self-speculative")
GGUF_OF_WEIGHTS = {"int8": "q8_0", "int4": "q4_1"}
GGUF_OF_DTYPE = {"torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float32": "f32"}

Progress = Callable[[str, int, int], None]  # name of a phase, steps done, and in all


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure with its standard error (None where there is none) and its better direction."""

    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, where non-finite values are null."""
        numbers = {"value": self.value, "stderr": self.stderr}
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {**finite, "higher_is_better": self.higher_is_better}


@dataclasses.dataclass
class Row:
    """One way of decoding in an evaluation, and its metrics: task -> name -> figure.

    Attributes:
        config: resolved.
        mode: as requested, which may be "auto".
        drafted: number of drafted tokens over all generated answers.
        accepted: number of those that the model agreed with.
    """

    config: DecodingConfig
    mode: str
    results: dict[str, dict[str, Metric]] = dataclasses.field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        names = ("exit_layer", "draft_tokens", "draft_from")
        return {
            "mode": self.mode,
            **{name: getattr(self.config, name) for name in names},
            "adaptive": bool(self.config.adaptive),
            "acceptance_rate": self.accepted / self.drafted if self.drafted else None,
            "results": {
                task: {name: metric.to_dict() for name, metric in metrics.items()}
                for task, metrics in self.results.items()
            },
        }


def rows_of(
    model: LayerSkipModel,
    modes: Sequence[str],
    exit_layers: Sequence[int] | None = None,
    draft_tokens: int | None = None,
    draft_from: str | None = None,
) -> list[Row]:
    """Return a row for each mode and exit; modes that decode in the same way are one row.

    Args:
        model: its checkpoint's settings fill in what is None.
        modes: "auto" and those of `MODES`.
        exit_layers: of early exit and self-speculation. None: for early exit a quarter of the layers, a
            half, three quarters and all; else the checkpoint's exit.
        draft_tokens: of self-speculation.
        draft_from: of self-speculation, one of `DRAFT_SOURCES`.

    Raises:
        ValueError: an option does not fit the model.
    """
    n_layers = len(model.decoder.layers)
    quarters = sorted({math.ceil(n_layers * i / N_EXITS) for i in range(1, N_EXITS + 1)})
    rows: dict[DecodingConfig, Row] = {}
    for mode in modes:
        exits: Sequence[int | None] = exit_layers or (quarters if mode == "early-exit" else [None])
        drafts: dict[str, Any] = {}
        if mode in DRAFTING:
            drafts = {"draft_tokens": draft_tokens, "draft_from": draft_from}
        if mode == "plain" or drafts.get("draft_from") == "n-gram":
            exits = [None]
        for e in exits:
            config = model.resolve(DecodingConfig(mode=mode, exit_layer=e, **drafts))
            rows.setdefault(config, Row(config, mode))
    return list(rows.values())


def bench(
    model: LayerSkipModel,
    task: Task,
    config: BenchConfig,
    *,
    source: str,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Measure all rows and return the document that docs/reference/results.md describes.

    Where Ctrl-C or an error ends the measurement after the first prompt, the document has the figures of
    the prompts so far (`interrupted`), without scores.

    Args:
        model: the checkpoint, loaded.
        task: prompts and how to score answers.
        config: see `BenchConfig`; the task and its prompts are those of `task`.
        source: the checkpoint's name, from which baselines load it.
        progress: called after each step of a long phase.

    Raises:
        ValueError: an option does not fit the model, or no prompt fits into its context.
    """
    new_tokens = config.max_new_tokens or task.max_new_tokens
    stop = () if config.ignore_eos else task.stop
    n_samples = len(task.samples)
    task, prompts = _fitting(model, task, new_tokens)
    n_skipped = n_samples - len(prompts)
    predictions = _predictions(task, prompts)
    with_predictions = len(predictions) == len({*map(tuple, prompts)})
    settings = settings_of(model, config, stop=stop, with_predictions=with_predictions)
    layerskip = LayerSkipSystem(model, settings, predictions=predictions)
    gguf_weights = config.gguf_weights or _gguf_weights(model)
    with start_baselines(
        model,
        config.baselines,
        source=source,
        drafts=_pairs_of_transformers(settings),
        context=max(map(len, prompts)) + new_tokens,
        stop=stop,
        ignore_eos=config.ignore_eos,
        gguf_weights=gguf_weights,
        progress=lambda done, total: progress("starting baselines", done, total),
    ) as baselines:
        entries, bandwidth, interrupted, failure = _measured(
            [layerskip, *baselines], prompts, new_tokens, config, model, progress
        )
    answered = max(len(entry.runs) for entry in entries)
    prompts = prompts[:answered]
    task = dataclasses.replace(task, samples=task.samples[:answered])
    may_copy = _may_copy(model, task, prompts)

    def rows(scored: bool) -> list[dict[str, Any]]:
        texts = prompts, may_copy
        return list(_rows(entries, task, texts, bandwidth, scored=scored, progress=progress))

    try:
        figures = rows(scored=not config.ignore_eos and not interrupted)
    except (KeyboardInterrupt, Exception) as error:  # keep the measurement
        interrupted, failure = isinstance(error, KeyboardInterrupt), _message(error)
        figures = rows(scored=False)
    weight_bytes = model.decoder.weight_bytes
    return {
        "environment": environment_of(
            model.decoder,
            packages=["transformers", *(BASELINES[name].distribution for name in config.baselines)],
        )
        | {f"{baseline.name} build": baseline.build for baseline in baselines if baseline.build},
        "model": source,
        "n_layers": len(model.decoder.layers),
        "task": task.name,
        "samples": len(prompts),
        "skipped_too_long": n_skipped,
        "prompt_tokens_mean": statistics.mean(map(len, prompts)),
        "max_new_tokens": new_tokens,
        "ignore_eos": config.ignore_eos,
        "sampling": dataclasses.asdict(config.sampling),
        "repeats": min(len(runs) for entry in entries for runs in entry.runs),
        "peak_memory_scope": layerskip.memory.scope,
        "weight_bytes": weight_bytes,
        "read_bandwidth_bytes_per_s": bandwidth,
        "ceiling_tokens_per_s": bandwidth / weight_bytes,
        "gguf_weights": (gguf_weights or STORED) if "llama.cpp" in config.baselines else None,
        "code_execution": task.code_execution,
        "interrupted": interrupted,
        "not_scored": failure,
        "rows": figures,
    }


def _measured(
    systems: Sequence[System],
    prompts: list[list[int]],
    new_tokens: int,
    config: BenchConfig,
    model: LayerSkipModel,
    progress: Progress,
) -> tuple[list[Entry], float, bool, str | None]:
    """Return the entries, the read bandwidth in bytes/s, whether it was interrupted, and the error."""
    bandwidths: list[float] = []
    entries: list[Entry] = []
    try:
        entries = measure(
            systems,
            prompts,
            max_new_tokens=new_tokens,
            repeats=config.repeats,
            progress=lambda done, total: progress("answering", done, total),
            between=lambda: bandwidths.append(read_bandwidth(model.decoder.device)),
            partial=entries,
        )
    except (KeyboardInterrupt, Exception) as error:
        if not entries:
            raise
        return entries, statistics.median(bandwidths), True, _message(error)
    return entries, statistics.median(bandwidths), False, None


def _pairs_of_transformers(settings: Sequence[Setting]) -> list[tuple[int, int]]:
    """Return (E, d) of the rows that transformers can decode too."""
    return [
        (config.exit_layer, config.draft_tokens)
        for setting in settings
        if (config := setting.config).exit_layer
        and config.draft_tokens
        and setting.mode == "self-speculative"
        and config.draft_from == "early-exit"
        and not (config.adaptive or config.draft_vocabulary)
    ]


def _message(error: BaseException) -> str | None:
    """Return the type and text of an error; None for Ctrl-C."""
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else None


def _gguf_weights(model: LayerSkipModel) -> str | None:
    """Return the precision of GGUF that is nearest to the decoder's; None: as the file stores it."""
    decoder = model.decoder
    if decoder.weights == STORED:
        return None
    return GGUF_OF_WEIGHTS.get(decoder.weights) or GGUF_OF_DTYPE[str(decoder.dtype)]


def _fitting(model: LayerSkipModel, task: Task, new_tokens: int) -> tuple[Task, list[list[int]]]:
    """Return the samples whose prompt and answer fit into the context, and their token ids."""
    limit = model.decoder.architecture.max_context - new_tokens
    pairs = [(sample, _token_ids(model, sample)) for sample in task.samples]
    fitting = [(sample, ids) for sample, ids in pairs if 0 < len(ids) <= limit]
    if not fitting:
        raise ValueError(
            f"no prompt of {task.name} leaves room for {new_tokens} new tokens in this model's context"
            f" of {model.decoder.architecture.max_context}; try a lower --n-shot or --max-new-tokens"
        )
    task = dataclasses.replace(task, samples=tuple(sample for sample, _ in fitting))
    return task, [ids for _, ids in fitting]


def _token_ids(model: LayerSkipModel, sample: Sample) -> list[int]:
    try:
        return model.tokenize(sample.prompt)
    except ValueError as error:
        raise ValueError(f"{sample.id}: {error}") from error


def _predictions(task: Task, prompts: Sequence[list[int]]) -> dict[tuple[int, ...], str]:
    """Return the prediction of each prompt that has one."""
    pairs = zip(prompts, task.samples, strict=True)
    return {tuple(ids): sample.prediction for ids, sample in pairs if sample.prediction}


def _may_copy(model: LayerSkipModel, task: Task, prompts: Sequence[list[int]]) -> list[bool]:
    """Return for each prompt whether its answer should copy it, as a reference does."""
    if model.tokenizer is None:
        return [False] * len(prompts)
    encode = model.tokenizer.encode
    return [
        any(is_echo(encode(text, add_special_tokens=False), ids) for text in sample.references)
        for sample, ids in zip(task.samples, prompts, strict=True)
    ]


def _rows(
    entries: Sequence[Entry],
    task: Task,
    prompts: tuple[Sequence[Sequence[int]], Sequence[bool]],
    bandwidth: float,
    *,
    scored: bool,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    plain = {e.system.name: e.runs for e in entries if e.setting.mode == "plain" and not e.error}
    for number, entry in enumerate(entries, 1):
        progress("scoring", number - 1, len(entries))
        is_baseline = entry.system.name != LayerSkipSystem.name
        yield row(
            entry,
            plain=plain.get(entry.system.name),
            layerskip_plain=plain[LayerSkipSystem.name] if is_baseline else None,
            read_bandwidth=bandwidth,
            quality=task.quality if scored else None,
            categories=[sample.category for sample in task.samples],
            prompts=prompts[0],
            may_copy=prompts[1],
        )
        progress("scoring", number, len(entries))
