"""Tuning: answers, costs, predictions, real runs, the choice, and settings for the checkpoint."""

import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from layerskip.bench.machine import environment_of
from layerskip.bench.measure import Setting, measure
from layerskip.bench.rows import row
from layerskip.bench.systems import LayerSkipSystem
from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.decoding.streaming import accepted_by_position
from layerskip.fileio import check_within, read_json, replace_json
from layerskip.model import StepCosts
from layerskip.model.checkpoint import (
    EXIT,
    FILE,
    KEY,
    entries_of,
    readable_costs,
    special_tokens,
    text_of_ids,
)
from layerskip.model.draft_data import MAX_DATASTORE_TOKENS, MAX_DRAFT_VOCABULARY, worth_drafting
from layerskip.model.native import num_threads_of
from layerskip.model.step_timing import costs_kind
from layerskip.options import check_options, option
from layerskip.tune.costs import ANCHORS, SWEEPS, Costs, measure_costs
from layerskip.tune.predict import (
    Continuation,
    Prediction,
    agreement_rate,
    predict,
    predict_plain,
    read_agreement,
    replay,
)

MAX_NEW_TOKENS = 64  # default where a task allows more
CANDIDATES = 3  # predictions that are confirmed by real runs
SLOW_STEP_S = 0.05  # with slower steps, timing all exits of a deep model would take an hour
FEW_EXITS, FEW_SWEEPS = 8, 2  # for slow models
_TRIAL_TOKENS, _TRIAL_PROMPT = 5, 32
# Estimates in plain steps: a draft with its verification, between 1 and 6 tokens; answers made for
# reading, confirming and mode auto; whole rounds of a sweep.
_STEPS_PER_PAIR, _ANSWERS_PER_PROMPT, _OTHER_STEPS = 2.5, 10, 40
_CONTEXTS = 3

Progress = Callable[[str, int, int], None]  # name of a phase, steps done, and in all
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Options of tuning.

    Raises:
        ValueError: a value is out of range.
    """

    data: str | None = option(
        None,
        "Prompts like yours: a task of layerskip bench, a .jsonl, or a .txt with a prompt a paragraph."
        " Default: a few general questions.",
        metavar="TASK|FILE",
    )
    samples: int = option(20, "Maximum number of prompts.", at_least=2, metavar="N")
    seed: int = option(1, "Seed of the choice of prompts; that of layerskip bench is 0.")
    max_new_tokens: int | None = option(
        None,
        f"Maximum number of new tokens. Default: the task's, at most {MAX_NEW_TOKENS}.",
        at_least=2,
        metavar="N",
    )
    max_draft_tokens: int = option(
        16, "Longest draft to consider.", at_least=1, at_most=64, metavar="D"
    )
    exit_layers: tuple[int, ...] = option(
        (),
        "Exit layers to consider. Default: all, about 8 of a slow model.",
        at_least=1,
        flags=("--exit-layers", "--exit-layer"),
        metavar="4,8,10-12",
    )
    grid: bool = option(
        False, "Run every pair, instead of the best three; this takes long: keep --samples few."
    )
    keep_datastore: bool = option(
        False,
        "Write the answers into the checkpoint too, as an n-gram datastore of mode auto.",
        flags=("--keep-datastore", "--keep-draft-text"),
    )
    dry_run: bool = option(False, "Write nothing into the checkpoint.")
    sweeps: int = option(
        SWEEPS,
        "Number of times that the parts of a round are timed.",
        at_least=1,
        on_command_line=False,
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchBudget:
    """The exits and sweeps that a model's speed allows.

    Attributes:
        step_s: seconds of a plain step, timed on a few tokens.
        config: for `tune`.
        seconds: estimated duration of tuning.
    """

    step_s: float
    config: TuneConfig
    seconds: float


def search_budget(
    model: LayerSkipModel, prompts: Sequence[Any], config: TuneConfig
) -> SearchBudget:
    """Time a plain step, and choose exits and sweeps where the config names no exits.

    With a step above `SLOW_STEP_S`, the exits are about `FEW_EXITS`, evenly spread, and the
    checkpoint's own, and they are timed `FEW_SWEEPS` times.

    Raises:
        ValueError: an exit layer does not fit the model.
    """
    n_exits = len(_exits(model, config.exit_layers))
    step_s, n_layers = _plain_step_s(model, prompts), len(model.decoder.layers)
    if not config.exit_layers and step_s > SLOW_STEP_S and n_layers > FEW_EXITS + 1:
        exits = {round(e) for e in np.linspace(1, n_layers - 1, FEW_EXITS)}
        current = model.settings.exit_layer
        if current is not None and current < n_layers:
            exits.add(current)
        config = dataclasses.replace(config, exit_layers=tuple(sorted(exits)), sweeps=FEW_SWEEPS)
        n_exits = len(exits)
    pairs = 2 * n_exits + ANCHORS * (config.max_draft_tokens + 1)
    of_costs = _CONTEXTS * (config.sweeps + 1) * (_STEPS_PER_PAIR * pairs + _OTHER_STEPS)
    answers = _ANSWERS_PER_PROMPT + (n_exits * config.max_draft_tokens if config.grid else 0)
    steps = of_costs + answers * len(prompts) * (config.max_new_tokens or MAX_NEW_TOKENS)
    return SearchBudget(step_s=step_s, config=config, seconds=step_s * steps)


def _plain_step_s(model: LayerSkipModel, prompts: Sequence[Any]) -> float:
    """Time a step after the first prompt with a token; 0 where `tune` will refuse the prompts."""
    longest = model.decoder.architecture.max_context - _TRIAL_TOKENS
    ids = next(filter(None, (model.tokenize(p)[:_TRIAL_PROMPT] for p in prompts)), [])
    if not 0 < len(ids) < longest:
        return 0.0
    for _ in range(2):  # the first one is a warm-up
        trial = model.generate(ids, mode="plain", max_new_tokens=_TRIAL_TOKENS, ignore_eos=True)
    return trial.decode_s / (_TRIAL_TOKENS - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The fastest way to decode these prompts on this machine.

    Attributes:
        mode: "auto" where adaptive drafts gain most.
        exit_layer: None where the early exit should not draft: plain decoding, or n-grams alone.
        draft_tokens: None with exit_layer.
        tokens_per_s: measured.
        speedup: measured, over plain decoding of the same prompts; 1 for plain decoding.
        speedup_interval: 95% over the prompts.
        reason: one sentence for people.
    """

    mode: Literal["plain", "self-speculative", "auto"]
    exit_layer: int | None
    draft_tokens: int | None
    tokens_per_s: float
    speedup: float
    speedup_interval: list[float]
    reason: str

    @property
    def flags(self) -> str:
        """The choice as command line flags, which cannot pass the measured costs to mode auto."""
        if self.mode == "plain":
            return "--mode plain"
        if self.mode == "auto":
            alone = self.exit_layer is None
            return "--draft-from n-gram" if alone else f"--exit-layer {self.exit_layer}"
        pair = f"--exit-layer {self.exit_layer} --draft-tokens {self.draft_tokens}"
        return f"--mode {self.mode} {pair}"


def is_significant(row: Mapping[str, Any]) -> bool:
    """Return True if the whole interval of a row's speedup is above 1."""
    return bool(row["speedup_interval"][0] > 1.0)


def choose(rows: Sequence[Mapping[str, Any]]) -> Choice:
    """Choose the fastest of the rows whose speedup is significant, else plain decoding.

    Args:
        rows: of `bench.rows.row`, plain decoding first, then at least one other.
    """
    plain, *others = rows
    fastest, gain = _fastest(others)
    pair = f"E={fastest['exit_layer']}, d={fastest['draft_tokens']}"
    if not is_significant(fastest):
        return Choice(
            mode="plain",
            exit_layer=None,
            draft_tokens=None,
            tokens_per_s=plain["tokens_per_s"],
            speedup=1.0,
            speedup_interval=[1.0, 1.0],
            reason=f"plain decoding is best here: the best of the pairs tried, {pair}, runs at {gain}",
        )
    return _choice(
        "self-speculative",
        fastest,
        fastest["draft_tokens"],
        f"self-speculative decoding with {pair} is best here: {gain}",
    )


def choose_auto(
    pairs: Choice, rows: Sequence[Mapping[str, Any]], draft_tokens: Mapping[int, int]
) -> Choice:
    """Choose mode auto where its speedup is significant and not below that of the pair chosen.

    Args:
        pairs: the result of `choose`.
        rows: of mode auto, n-grams alone first, then with early exits.
        draft_tokens: best draft length of each of these exits, for drafts of a fixed length.
    """
    fastest, gain = _fastest(rows)
    exit_layer = fastest["exit_layer"]
    if not is_significant(fastest) or fastest["speedup"] < pairs.speedup:
        # Mode auto is the default, so the reason names its speedup.
        auto = f"mode auto with {name_of_auto(exit_layer)} comes to {gain}"
        return dataclasses.replace(pairs, reason=f"{pairs.reason}; {auto}")
    fixed = (
        "drafts of a fixed length gain nothing for certain"
        if pairs.mode == "plain"
        else f"E={pairs.exit_layer} with d={pairs.draft_tokens} fixed comes to {pairs.speedup:.2f}x"
    )
    return _choice(
        "auto",
        fastest,
        None if exit_layer is None else draft_tokens[exit_layer],
        f"mode auto with {name_of_auto(exit_layer)} is best here: {gain}; {fixed}",
    )


def _choice(
    mode: Literal["self-speculative", "auto"],
    row: Mapping[str, Any],
    draft_tokens: int | None,
    reason: str,
) -> Choice:
    return Choice(
        mode=mode,
        exit_layer=row["exit_layer"],
        draft_tokens=draft_tokens,
        tokens_per_s=row["tokens_per_s"],
        speedup=row["speedup"],
        speedup_interval=list(row["speedup_interval"]),
        reason=reason,
    )


def _fastest(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """Return the fastest of the rows with a significant gain, else of all, and its gain in words."""
    significant = [row for row in rows if is_significant(row)]
    row = max(significant or rows, key=lambda row: float(row["speedup"]))
    low, high = row["speedup_interval"]
    gain = f"{row['speedup']:.2f}x of plain decoding (95% interval {low:.2f} to {high:.2f})"
    return row, gain


def name_of_auto(exit_layer: int | None) -> str:
    """Name the source of drafts of mode auto."""
    return "n-grams" if exit_layer is None else f"E={exit_layer}"


_MIN_COST = 1e-3  # of a plain step: a difference of medians can be 0
_MIN_ANSWER = 8  # tokens: shorter answers are part of other texts too
_VOCABULARY_DIVISOR = 4  # a quarter of the vocabulary, for a checkpoint without a list


def step_costs(costs: Costs, exit_layer: int, model: LayerSkipModel) -> StepCosts:
    """Return the costs at the middle context in plain steps, for drafts at one exit with the whole head.

    A pass over n positions is assumed to grow with n as verification after that exit does.
    """
    middle, x = costs.middle, costs.exits.index(exit_layer)
    plain, verify = float(costs.plain_s[middle]), costs.verify_s[middle, x]
    dtype, weights, device, kernels, machine = costs_kind(model.decoder)
    return StepCosts(
        dtype=dtype,
        weights=weights,
        device=device,
        kernels=kernels,
        machine=machine,
        threads=num_threads_of(kernels) if device == "cpu" else 0,
        exit_layer=exit_layer,
        draft_step=max(float(costs.draft_step_s[middle, x]) / plain, _MIN_COST),
        draft_tokens_scored=model.decoder.architecture.vocab_size,
        head=max(float(costs.head_s[middle]) / plain, _MIN_COST),
        passes=tuple(float(seconds / verify[0]) for seconds in verify),
        overhead=max(float(costs.round_overhead_s[middle]) / plain, 0.0),
        context=costs.contexts[middle],
    )


def datastore_with(
    answers: Iterable[Sequence[int]], datastore: Sequence[int] | None
) -> tuple[int, ...]:
    """Append to a datastore the answers that it does not have, each once."""
    text = _letters(datastore or ())
    new = dict.fromkeys(tuple(answer) for answer in answers if _letters(answer) not in text)
    return tuple(itertools.chain(datastore or (), *new))[:MAX_DATASTORE_TOKENS]


def datastore_without(
    answers: Iterable[Sequence[int]], datastore: Sequence[int] | None
) -> tuple[int, ...] | None:
    """Remove from a datastore the answers that tuning on the same prompts may have put there."""
    if datastore is None:
        return None
    text = _letters(datastore)
    for answer in answers:
        if len(answer) >= _MIN_ANSWER:
            text = text.replace(_letters(answer), "")
    return tuple(map(ord, text))


def _letters(tokens: Sequence[int]) -> str:
    """Return a string with one character per token, for its fast search."""
    return "".join(map(chr, tokens))


def draft_vocabulary(
    texts: Iterable[Sequence[int]], model: LayerSkipModel
) -> tuple[int, ...] | None:
    """Return the tokens of prompts and answers that are worth drafting, then those of the checkpoint.

    For a checkpoint without a list, the first quarter of the vocabulary follows: few texts do not have
    all tokens that answers consist of.
    """
    a = model.decoder.architecture
    counts = Counter(token for text in texts for token in text)
    row_bytes = model.decoder.head.weight_bytes / a.vocab_size
    tokens = worth_drafting(
        counts,
        row_share=row_bytes / model.decoder.weight_bytes,
        vocab_size=a.vocab_size,
        always=sorted(token for token in model.end_tokens if token < a.vocab_size),
    )
    rest = model.settings.draft_vocabulary or range(a.vocab_size // _VOCABULARY_DIVISOR)
    return None if tokens is None else tuple(dict.fromkeys([*tokens, *rest]))[:MAX_DRAFT_VOCABULARY]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Result of tuning.

    Attributes:
        prompts: number of prompts with an answer of at least two tokens.
        skipped: number of the others: without a token, too long, or with a shorter answer.
        max_new_tokens: of each answer.
        exits: for each exit its agreement with the model's next token over all positions, and the
            acceptance by draft position.
        predicted_plain_tokens_per_s: from the costs alone, as the predictions are.
        predictions: every exit and draft length, the fastest predicted first.
        grid: real runs of all of them, each with its prediction; None unless requested.
        confirmed: interleaved real runs, plain decoding first, each with its prediction.
        auto: from the same runs, plain decoding, and mode auto with n-grams alone and with each of the
            exits in `confirmed`.
        step_costs: for mode auto: costs in plain steps.
        draft_vocabulary: for mode auto: tokens worth drafting, the most frequent first.
        datastore: for mode auto: the checkpoint's, with the answers. Auto was tried without them, since
            they are those of these prompts.
    """

    environment: dict[str, Any]
    prompts: int
    skipped: int
    max_new_tokens: int
    costs: Costs
    exits: list[Row]
    predicted_plain_tokens_per_s: float
    predictions: list[Prediction]
    grid: list[Row] | None
    confirmed: list[Row]
    auto: list[Row]
    choice: Choice
    step_costs: StepCosts
    draft_vocabulary: tuple[int, ...] | None
    datastore: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "environment": self.environment,
            "prompts": self.prompts,
            "skipped": self.skipped,
            "max_new_tokens": self.max_new_tokens,
            "chosen": {**dataclasses.asdict(self.choice), "flags": self.choice.flags},
            "confirmed": self.confirmed,
            "auto": self.auto,
            "predicted_plain_tokens_per_s": self.predicted_plain_tokens_per_s,
            "predictions": [dataclasses.asdict(p) for p in self.predictions],
            "grid": self.grid,
            "exits": self.exits,
            "costs": self.costs.to_dict(),
            "step_costs": self.step_costs.to_dict(),
            "draft_vocabulary": len(self.draft_vocabulary or ()),
            "draft_text": len(self.datastore),
        }

    def record(self) -> dict[str, Any]:
        """Return what the checkpoint keeps: the gain, and the machine."""
        names = ("mode", "tokens_per_s", "speedup", "speedup_interval")
        return {
            **{name: getattr(self.choice, name) for name in names},
            "prompts": self.prompts,
            "max_new_tokens": self.max_new_tokens,
            "environment": self.environment,
        }


def tune(
    model: LayerSkipModel,
    prompts: Sequence[Any],
    config: TuneConfig | None = None,
    *,
    stop: Sequence[str] = (),
    progress: Progress = lambda phase, done, total: None,
    **overrides: Any,
) -> Tuning:
    """Find the fastest exit layer and draft length for these prompts on this machine.

    Args:
        model: in the dtype, with the weights and on the device to tune for.
        prompts: as for `LayerSkipModel.generate`; at least two.
        config: see `TuneConfig`, and `search_budget` for slow models.
        stop: texts that end an answer.
        progress: called while it works.
        overrides: options that replace those of the config.

    Raises:
        ValueError: an option that does not fit the model, or too few prompts with an answer.
    """
    config = dataclasses.replace(config or TuneConfig(), **overrides)
    layers = _exits(model, config.exit_layers)
    new_tokens = config.max_new_tokens or MAX_NEW_TOKENS
    # 1. Read the agreement of every exit from plain answers.
    useful, continuations = _read_answers(model, prompts, layers, new_tokens, stop, progress)
    answers = [c.token_ids for c in continuations]
    texts = [[*prompt, *answer] for prompt, answer in zip(useful, answers, strict=True)]
    # 2. Measure the costs of a round's parts.
    costs = measure_costs(
        model.decoder,
        max(texts, key=len),
        contexts=_contexts(continuations),
        exits=layers,
        max_draft_tokens=config.max_draft_tokens,
        sweeps=config.sweeps,
        progress=partial(progress, "timing the parts of a round"),
    )
    # 3. Predict the speed of every pair.
    predictions = predict(costs, continuations, config.max_draft_tokens)
    plain_tokens_per_s = predict_plain(costs, continuations)

    def run(systems: Sequence[LayerSkipSystem], phase: str) -> list[Row]:
        entries = measure(
            systems, useful, max_new_tokens=new_tokens, progress=partial(progress, phase)
        )
        return [row(entry, plain=entries[0].runs) for entry in entries]

    def pairs(some: Sequence[Prediction]) -> LayerSkipSystem:
        shared = DecodingConfig(mode="plain", stop=tuple(stop))
        settings = [Setting(config=shared), *(_setting(p, shared) for p in some)]
        return LayerSkipSystem(model, settings)

    def with_predictions(rows: Sequence[Row], some: Sequence[Prediction]) -> list[Row]:
        speeds = [plain_tokens_per_s, *(p.tokens_per_s for p in some)]
        return [
            _with_prediction(measured, speed, plain_tokens_per_s)
            for measured, speed in zip(rows, speeds, strict=True)
        ]

    best, grid_rows = predictions[:CANDIDATES], None
    if config.grid:
        grid_rows = with_predictions(run([pairs(predictions)], "running every pair"), predictions)
        measured = zip(predictions, grid_rows[1:], strict=True)
        fastest = sorted(measured, key=lambda pair: float(pair[1]["speedup"]), reverse=True)
        best = [prediction for prediction, _ in fastest[:CANDIDATES]]
    # 4. Confirm the best pairs, and mode auto, by interleaved real runs.
    lengths: dict[int, int] = {}
    for prediction in best:
        lengths.setdefault(prediction.exit_layer, prediction.draft_tokens)
    vocabulary = draft_vocabulary(texts, model)
    datastore = datastore_without(answers, model.settings.draft_text)
    auto = _auto_systems(model, costs, lengths, vocabulary, datastore, stop)
    rows = run([pairs(best), *auto], "confirming the best by real runs")
    confirmed = with_predictions(rows[: 1 + len(best)], best)
    auto_rows = rows[1 + len(best) :]
    # 5. Choose.
    fixed = choose(confirmed)
    if fixed.exit_layer is not None and fixed.draft_tokens is not None:
        lengths[fixed.exit_layer] = fixed.draft_tokens
    choice = choose_auto(fixed, auto_rows, lengths)
    exit_layer = choice.exit_layer or fixed.exit_layer or best[0].exit_layer
    return Tuning(
        environment=environment_of(model.decoder),
        prompts=len(useful),
        skipped=len(prompts) - len(useful),
        max_new_tokens=new_tokens,
        costs=costs,
        exits=[_exit_row(continuations, e, config.max_draft_tokens) for e in layers],
        predicted_plain_tokens_per_s=plain_tokens_per_s,
        predictions=predictions,
        grid=grid_rows,
        confirmed=confirmed,
        auto=[rows[0], *auto_rows],
        choice=choice,
        step_costs=step_costs(costs, exit_layer, model),
        draft_vocabulary=vocabulary,
        datastore=datastore_with(answers, datastore),
    )


def _read_answers(
    model: LayerSkipModel,
    prompts: Sequence[Any],
    layers: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[str],
    progress: Progress,
) -> tuple[list[list[int]], list[Continuation]]:
    """Return the prompts whose answers have two tokens, as token ids, and all exits' agreement."""
    context = model.decoder.architecture.max_context
    tokenized = [ids for ids in map(model.tokenize, prompts) if 0 < len(ids) < context]
    useful: list[list[int]] = []
    continuations: list[Continuation] = []
    for i, prompt in enumerate(tokenized, 1):
        answer = model.generate(prompt, mode="plain", max_new_tokens=max_new_tokens, stop=stop)
        if answer.new_tokens >= 2:
            useful.append(prompt)
            continuations.append(
                read_agreement(model.decoder, prompt, answer.token_ids, layers, max_new_tokens)
            )
        progress("reading the agreement of every exit", i, len(tokenized))
    if len(useful) < 2:
        raise ValueError(
            f"{len(useful)} of {len(prompts)} prompts fit into the context and have an answer of two"
            " tokens or more; tuning needs two such prompts at least"
        )
    return useful, continuations


def _auto_systems(
    model: LayerSkipModel,
    costs: Costs,
    draft_tokens: Mapping[int, int],
    vocabulary: tuple[int, ...] | None,
    datastore: tuple[int, ...] | None,
    stop: Sequence[str],
) -> list[LayerSkipSystem]:
    """Return mode auto with n-grams alone and with each exit, as it runs with such settings.

    `draft_tokens` has a length for each exit, the best exit first.
    """
    systems: list[LayerSkipSystem] = []
    best = next(iter(draft_tokens))
    for exit_layer in (None, *draft_tokens):
        measured = step_costs(costs, exit_layer or best, model)
        settings = dataclasses.replace(
            model.settings,
            exit_layer=exit_layer,
            draft_tokens=None if exit_layer is None else draft_tokens[exit_layer],
            costs=(measured,),
            draft_vocabulary=vocabulary,
            draft_text=datastore,
        )
        tuned = model.with_settings(settings)
        config = tuned.resolve(mode="auto", stop=tuple(stop))
        systems.append(LayerSkipSystem(tuned, [Setting(config=config, mode="auto")]))
    return systems


def _exits(model: LayerSkipModel, exit_layers: Sequence[int]) -> list[int]:
    n_layers = len(model.decoder.layers)
    layers = sorted(set(exit_layers or range(1, n_layers)))
    if not layers:
        raise ValueError("this model has a single layer; there is no exit before the last one")
    if layers[0] < 1 or layers[-1] >= n_layers:
        raise ValueError(f"exit layers for drafting are 1 to {n_layers - 1} in this model")
    return layers


def _contexts(continuations: Sequence[Continuation]) -> list[int]:
    """Return the shortest and the longest context of a round of these answers, and their middle."""
    shortest = min(c.prompt_tokens for c in continuations)
    longest = max(c.prompt_tokens + len(c.token_ids) for c in continuations)
    return [shortest, (shortest + longest) // 2, longest]


def _setting(prediction: Prediction, plain: DecodingConfig) -> Setting:
    config = dataclasses.replace(
        plain,
        mode="self-speculative",
        draft_from="early-exit",
        adaptive=False,
        exit_layer=prediction.exit_layer,
        draft_tokens=prediction.draft_tokens,
    )
    return Setting(config=config)


def _with_prediction(measured: Row, tokens_per_s: float, plain_tokens_per_s: float) -> Row:
    """Return a measured row with its prediction and relative errors (0.1: 10% too high)."""
    speedup = tokens_per_s / plain_tokens_per_s
    return {
        **measured,
        "predicted_tokens_per_s": tokens_per_s,
        "predicted_speedup": speedup,
        "error_of_tokens_per_s": tokens_per_s / measured["tokens_per_s"] - 1,
        "error_of_speedup": speedup / measured["speedup"] - 1,
    }


def _exit_row(continuations: Sequence[Continuation], exit_layer: int, draft_tokens: int) -> Row:
    rounds = [step for c in continuations for step in replay(c, exit_layer, draft_tokens)]
    return {
        "exit_layer": exit_layer,
        "agreement": agreement_rate(continuations, exit_layer),
        "accepted_by_position": accepted_by_position(rounds),
    }


def write_settings(
    folder: Path,
    choice: Choice,
    *,
    end_tokens: Sequence[int],
    record: Mapping[str, Any],
    costs: StepCosts | None = None,
    draft_vocabulary: Sequence[int] | None = None,
    datastore: Sequence[int] | None = None,
) -> Path:
    """Write `assistant_early_exit`, `num_assistant_tokens`, and the record of the tuning.

    Where transformers cannot draft with the model, the exit is under `layerskip` instead. Where no exit
    was chosen both fields are removed, so that mode auto drafts from n-grams alone; they stay where the
    file has costs of other weights or another machine, since the exit may pay there. All other fields
    stay. The file is replaced atomically.

    Args:
        folder: a checkpoint.
        choice: what to write.
        end_tokens: of the model, for a folder without such a file: transformers would take a new file
            without them to mean that there are none.
        record: kept under `layerskip`, key `tuning`.
        costs: kept there too, and replace those for the same kind of weights and machine; None keeps
            those in the file.
        draft_vocabulary: the same, token ids.
        datastore: the same, under `draft_text`.

    Returns:
        The file written.

    Raises:
        ValueError: the file is not a JSON object or a link out of the folder, or cannot be written.
    """
    file = folder / FILE
    check_within(file)
    fields = read_json(file) if file.is_file() else special_tokens(_config(folder), end_tokens)
    # With this mark transformers takes the file for a copy of config.json, and skips new fields.
    fields.pop("_from_model_config", None)
    present = fields.get(KEY)
    entry = {**(present if isinstance(present, dict) else {}), "tuning": dict(record)}
    others = []
    if costs is not None:
        same = [(costs.kind, threads) for threads in (costs.threads, 0)]
        for costs_entry in entries_of(entry):
            readable = readable_costs(costs_entry)
            if not isinstance(readable, StepCosts):  # another version may read them
                others.append(costs_entry)
            elif (readable.kind, readable.threads) not in same:
                others.append(readable.to_dict())
        entry["costs"] = [*others, costs.to_dict()]
    if choice.exit_layer is not None or not others:
        for key in ("assistant_early_exit", "num_assistant_tokens"):
            fields.pop(key, None)
        entry.pop(EXIT, None)
        if choice.exit_layer is not None and _runs_all_layers(folder):
            entry[EXIT] = choice.exit_layer
        elif choice.exit_layer is not None:
            fields["assistant_early_exit"] = choice.exit_layer
        if choice.draft_tokens is not None:
            fields["num_assistant_tokens"] = choice.draft_tokens
    if draft_vocabulary:
        entry["draft_vocabulary"] = text_of_ids(draft_vocabulary)
    if datastore:
        entry["draft_text"] = text_of_ids(datastore)
    fields[KEY] = entry
    try:
        replace_json(file, fields)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}") from error
    return file


def check_writable(folder: Path) -> None:
    """Check that settings can be written into a folder, before any long work starts.

    Raises:
        ValueError: the folder cannot be written to, or its file is no JSON object or a link out of it.
    """
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; --dry-run tunes without writing")
    check_within(folder / FILE)
    if (folder / FILE).is_file():
        read_json(folder / FILE)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_json(file) if file.is_file() else {}


def _runs_all_layers(folder: Path) -> bool:
    """Return True where transformers drafts with all layers, so that its `generate` would fail."""
    return _config(folder).get("model_type") == "gpt_neox"
