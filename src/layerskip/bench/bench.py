"""A benchmark: a model, a task, all systems and settings, one document of results."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from layerskip.bench.baselines import BASELINES, start_baselines
from layerskip.bench.machine import environment_of, read_bandwidth
from layerskip.bench.measure import Entry, Setting, System, measure
from layerskip.bench.quality import Sample
from layerskip.bench.rows import row
from layerskip.bench.systems import BENCH_MODES, LayerSkipSystem, settings_of
from layerskip.bench.tasks import Task
from layerskip.decoding import LayerSkipModel, Plan, Sampling
from layerskip.decoding.policy import choose

EXITS = 4  # evaluated where none are named: a quarter of the layers, a half, ... all
DRAFTING = ("auto", "self-speculative")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A figure with its standard error (None where there is none) and its good direction."""

    value: float
    stderr: float | None = None
    higher_is_better: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: such values are null."""
        numbers = {"value": self.value, "stderr": self.stderr}
        finite = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        return {**finite, "higher_is_better": self.higher_is_better}


@dataclasses.dataclass
class Row:
    """One way of decoding: task -> metric -> figure.

    Attributes:
        plan: what is run.
        mode: that was asked for, which may be "auto".
        drafted: draft tokens over all answers that were generated.
        accepted: those that the model agreed with.
    """

    plan: Plan
    mode: str
    results: dict[str, dict[str, Metric]] = dataclasses.field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        drafts = self.plan.mode == "self-speculative"
        return {
            "mode": self.mode,
            "exit_layer": self.plan.exit_layer,
            "draft_tokens": self.plan.draft_tokens,
            "draft_from": self.plan.draft_from if drafts else None,
            "adaptive": self.plan.adaptive,
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
    """Every mode at every exit; plain decoding has none and is one row, as are modes that run the same.

    Args:
        model: says how many layers there are, and what its checkpoint prefers.
        modes: "auto" and those of `MODES`.
        exit_layers: for early exit and self-speculation. None: for early exit a quarter of the
            layers, a half, three quarters and all; else the checkpoint's own exit.
        draft_tokens: for self-speculation.
        draft_from: for self-speculation, one of `DRAFT_SOURCES`.

    Raises:
        ValueError: as `policy.choose` does.
    """
    n_layers = len(model.decoder.layers)
    quarters = sorted({math.ceil(n_layers * i / EXITS) for i in range(1, EXITS + 1)})
    found: list[Row] = []
    for mode in modes:
        exits: Sequence[int | None] = exit_layers or (quarters if mode == "early-exit" else [None])
        drafts = (draft_tokens, draft_from) if mode in DRAFTING else (None, None)
        has_exits = mode != "plain" and drafts[1] != "n-gram"
        for e in exits if has_exits else [None]:
            plan = choose(mode, e, *drafts, settings=model.settings, n_layers=n_layers)
            if all(row.plan != plan for row in found):
                found.append(Row(plan, mode))
    return found


GGUF_OF_WEIGHTS = {"int8": "q8_0", "int4": "q4_1"}
GGUF_OF_DTYPE = {"torch.bfloat16": "bf16", "torch.float16": "f16", "torch.float32": "f32"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Attributes:
        modes: of `BENCH_MODES`; plain is measured in any case.
        exit_layers: E of early exit and of drafts; none = what `settings_of` finds.
        draft_tokens: d; none = what `settings_of` finds.
        draft_from: sources of drafts.
        draft_vocabulary: how many tokens an early exit may draft, in rows beside those with all.
        adaptive: whether drafts that decide their own length are measured too.
        ablation: whether auto is measured without each of its parts, and each part alone.
        max_new_tokens: None takes the task's.
        repeats: how often all prompts are gone through.
        ignore_eos: every answer goes on to max_new_tokens, past end tokens and stop strings; such
            answers are not scored.
        sampling: how tokens are chosen; drawn answers are not compared with one another.
        seed: of what is drawn.
        peers: of `BASELINES`, which answer greedily.
        gguf_weights: how weights are kept in the GGUF file for llama.cpp; None takes what is nearest to
            the model's own.

    Raises:
        ValueError: a mode or peer that does not exist, a number below 1, or peers with sampling.
    """

    modes: Sequence[str] = BENCH_MODES
    exit_layers: Sequence[int] = ()
    draft_tokens: Sequence[int] = ()
    draft_from: Sequence[str] = ("early-exit",)
    draft_vocabulary: Sequence[int] = ()
    adaptive: bool = False
    ablation: bool = False
    max_new_tokens: int | None = None
    repeats: int = 1
    ignore_eos: bool = False
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    peers: Sequence[str] = ()
    gguf_weights: str | None = None

    def __post_init__(self) -> None:
        for name, given, known in (
            ("mode", self.modes, BENCH_MODES),
            ("peer", self.peers, tuple(BASELINES)),
        ):
            if unknown := sorted(set(given) - set(known)):
                raise ValueError(
                    f"there is no {name} {unknown[0]!r}; there are: {', '.join(known)}"
                )
        if self.peers and self.sampling != Sampling():
            raise ValueError(
                "other systems answer greedily here: leave out the peers, or what is about sampling"
            )
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}, it has to be 1 or above")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, it has to be 1 or above")


def bench(
    model: LayerSkipModel,
    task: Task,
    config: BenchConfig,
    *,
    source: str,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure all rows; docs/bench.md says what every figure means.

    What ends it after the first prompt, Ctrl-C or an error, leaves the figures of the prompts so far
    (`interrupted`), not scored.

    Args:
        model: the checkpoint, loaded.
        task: prompts and how to score answers.
        config: what is measured.
        source: the checkpoint's name, for the peers to load it too.
        progress: told after each step of a long part: its name, how many are done, and of how many.

    Raises:
        ValueError: a setting that the model does not have, or no prompt that fits into its context.
    """
    settings = settings_of(
        model,
        modes=config.modes,
        exit_layers=config.exit_layers,
        draft_tokens=config.draft_tokens,
        draft_from=config.draft_from,
        draft_vocabulary=config.draft_vocabulary,
        adaptive=config.adaptive,
        ablation=config.ablation,
    )
    new_tokens = config.max_new_tokens or task.max_new_tokens
    stop = () if config.ignore_eos else task.stop
    own = LayerSkipSystem(
        model,
        settings,
        stop=stop,
        ignore_eos=config.ignore_eos,
        sampling=config.sampling,
        seed=config.seed,
    )
    n_samples = len(task.samples)
    task, prompts = _that_fit(model, task, new_tokens)
    n_skipped = n_samples - len(prompts)
    gguf_weights = config.gguf_weights or _gguf_weights(model)
    with start_baselines(
        model,
        config.peers,
        source=source,
        drafts=_pairs_of_transformers(settings),
        context=max(map(len, prompts)) + new_tokens,
        stop=stop,
        ignore_eos=config.ignore_eos,
        gguf_weights=gguf_weights,
        progress=lambda done, total: progress("starting peers", done, total),
    ) as peers:
        entries, bandwidth, interrupted, failure = _measured(
            [own, *peers], prompts, new_tokens, config, model, progress
        )
    answered = max(len(entry.runs) for entry in entries)
    prompts = prompts[:answered]
    task = dataclasses.replace(task, samples=task.samples[:answered])
    made_rows = partial(_rows, entries, task, bandwidth, config.sampling, progress=progress)
    scored = not config.ignore_eos and not interrupted
    try:
        rows = list(made_rows(scored=scored))
    except (KeyboardInterrupt, Exception) as error:  # what was measured is kept
        interrupted, failure = isinstance(error, KeyboardInterrupt), _in_words(error)
        rows = list(made_rows(scored=False))
    weight_bytes = model.decoder.weight_bytes
    return {
        "environment": environment_of(
            model.decoder,
            packages=["transformers", *(BASELINES[name].distribution for name in config.peers)],
        )
        | {f"{peer.name} build": peer.build for peer in peers if peer.build},
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
        "peak_memory_scope": own.memory.scope,
        "weight_bytes": weight_bytes,
        "read_bandwidth_bytes_per_s": bandwidth,
        "ceiling_tokens_per_s": bandwidth / weight_bytes,
        "gguf_weights": gguf_weights if "llama.cpp" in config.peers else None,
        "code_execution": task.code_execution,
        "interrupted": interrupted,
        "not_scored": failure,
        "rows": rows,
    }


def _measured(
    systems: Sequence[System],
    prompts: list[list[int]],
    new_tokens: int,
    config: BenchConfig,
    model: LayerSkipModel,
    progress: Callable[[str, int, int], None],
) -> tuple[list[Entry], float, bool, str | None]:
    """Answers of all systems, the memory's bandwidth meanwhile in bytes a second, and what ended it.

    The last two say whether Ctrl-C or an error did, and the error; the answers are then those to the
    prompts that all had answered.
    """
    bandwidths: list[float] = []
    so_far: list[Entry] = []
    interrupted = False
    failure: str | None = None
    try:
        so_far = measure(
            systems,
            prompts,
            max_new_tokens=new_tokens,
            repeats=config.repeats,
            progress=lambda done, total: progress("answering", done, total),
            between=lambda: bandwidths.append(read_bandwidth(model.decoder.device)),
            so_far=so_far,
        )
    except (KeyboardInterrupt, Exception) as error:  # what there is, is told
        if not so_far:
            raise
        interrupted, failure = True, _in_words(error)
    return so_far, statistics.median(bandwidths), interrupted, failure


def _pairs_of_transformers(settings: Sequence[Setting]) -> list[tuple[int, int]]:
    """(E, d) of the early exits without anything that transformers does not know."""
    early_exit = partial(Setting, mode="self-speculative")
    return [
        (s.exit_layer, s.draft_tokens)
        for s in settings
        if s.exit_layer and s.draft_tokens
        if s == early_exit(exit_layer=s.exit_layer, draft_tokens=s.draft_tokens)
    ]


def _in_words(error: BaseException) -> str | None:
    """What went wrong; None of Ctrl-C."""
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else None


def _gguf_weights(model: LayerSkipModel) -> str:
    """What is nearest to how our own decoder keeps its weights."""
    decoder = model.decoder
    return GGUF_OF_WEIGHTS.get(decoder.weights) or GGUF_OF_DTYPE[str(decoder.dtype)]


def _that_fit(model: LayerSkipModel, task: Task, new_tokens: int) -> tuple[Task, list[list[int]]]:
    """The samples whose prompt and answer fit into the context, and their token ids."""
    room = model.decoder.architecture.max_context - new_tokens
    pairs = [(sample, _ids(model, sample)) for sample in task.samples]
    fitting = [(sample, ids) for sample, ids in pairs if 0 < len(ids) <= room]
    if not fitting:
        raise ValueError(
            f"no prompt of {task.name} leaves room for {new_tokens} new tokens in this model's context"
            f" of {model.decoder.architecture.max_context}; try a lower --n-shot or --max-new-tokens"
        )
    task = dataclasses.replace(task, samples=tuple(sample for sample, _ in fitting))
    return task, [ids for _, ids in fitting]


def _ids(model: LayerSkipModel, sample: Sample) -> list[int]:
    try:
        return model.tokenize(sample.prompt)
    except ValueError as error:
        raise ValueError(f"{sample.id}: {error}") from error


def _rows(
    entries: Sequence[Entry],
    task: Task,
    bandwidth: float,
    sampling: Sampling,
    *,
    scored: bool,
    progress: Callable[[str, int, int], None],
) -> Iterator[dict[str, Any]]:
    plain = {e.system.name: e.runs for e in entries if e.setting.mode == "plain" and not e.error}
    for number, entry in enumerate(entries, 1):
        progress("scoring", number - 1, len(entries))
        others = entry.system.name != LayerSkipSystem.name
        yield row(
            entry,
            plain=plain.get(entry.system.name),
            layerskip_plain=plain[LayerSkipSystem.name] if others else None,
            read_bandwidth=bandwidth,
            quality=task.quality if scored else None,
            categories=[sample.category for sample in task.samples],
            drawn=not sampling.greedy,
        )
        progress("scoring", number, len(entries))
