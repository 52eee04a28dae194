"""The whole of tuning: answers, costs, predictions, real runs, and the choice."""

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
from layerskip.bench.systems import LayerSkipSystem, settings_of
from layerskip.decoding import LayerSkipModel
from layerskip.decoding.generation import accepted_by_position
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
from layerskip.model.datastore import MOST as MOST_OF_TEXT
from layerskip.model.draft_vocabulary import MOST, worth_drafting
from layerskip.model.native import num_threads_of
from layerskip.model.step_timing import costs_kind
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

SLOW_STEP_S = 0.05  # from here on all exits of a deep model would take an hour
FEW_EXITS = 8
FEW_SWEEPS = 2
_TRIED_TOKENS, _TRIED_PROMPT = 5, 32
# In plain steps and about, as everything here: a draft with its verification, between one token and
# six; how often all answers are made, for reading, confirming and in mode auto; whole rounds of a sweep.
_STEPS_OF_A_PAIR, _TIMES_ANSWERED, _OTHER_STEPS = 2.5, 10, 40
_CONTEXTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """What to tell `tune`.

    Attributes:
        step_s: seconds of a plain step, tried on a few tokens.
        exits: layers run; None for all.
        sweeps: how often every part is timed.
        seconds: what tuning takes then, about.
    """

    step_s: float
    exits: list[int] | None
    sweeps: int
    seconds: float


def effort_for(
    model: LayerSkipModel,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    max_draft_tokens: int,
    exits: Sequence[int] | None = None,
    grid: bool = False,
) -> Effort:
    """Time a plain step, and settle on exits and sweeps; arguments as of `tune`.

    Where a step takes longer than `SLOW_STEP_S` and nobody named exits, they are about `FEW_EXITS`,
    evenly spread, and the checkpoint's own, which are timed `FEW_SWEEPS` times.
    """
    step_s, n_layers = _plain_step_s(model, prompts), len(model.decoder.layers)
    chosen, sweeps = None if exits is None else list(exits), SWEEPS
    if chosen is None and step_s > SLOW_STEP_S and n_layers > FEW_EXITS + 1:
        spread = {round(e) for e in np.linspace(1, n_layers - 1, FEW_EXITS)}
        own = model.settings.exit_layer
        chosen = sorted(spread | ({own} if own is not None and own < n_layers else set()))
        sweeps = FEW_SWEEPS
    n_exits = n_layers - 1 if chosen is None else len(chosen)
    pairs = 2 * n_exits + ANCHORS * (max_draft_tokens + 1)
    of_costs = _CONTEXTS * (sweeps + 1) * (_STEPS_OF_A_PAIR * pairs + _OTHER_STEPS)
    answered = _TIMES_ANSWERED + (n_exits * max_draft_tokens if grid else 0)
    steps = of_costs + answered * len(prompts) * max_new_tokens
    return Effort(step_s=step_s, exits=chosen, sweeps=sweeps, seconds=step_s * steps)


def _plain_step_s(model: LayerSkipModel, prompts: Sequence[Any]) -> float:
    """Of the first prompt with a token; 0 where none has: `tune` says what is wrong with them."""
    room = model.decoder.architecture.max_context - _TRIED_TOKENS
    ids = next(filter(None, (model.tokenize(p)[:_TRIED_PROMPT] for p in prompts)), [])
    if not 0 < len(ids) < room:
        return 0.0
    for _ in range(2):  # the first one warms up
        tried = model.generate(ids, mode="plain", max_new_tokens=_TRIED_TOKENS, ignore_eos=True)
    return tried.decode_s / (_TRIED_TOKENS - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What to decode with on this machine and these prompts.

    Attributes:
        mode: "auto" where drafts gain most as mode auto makes them, as long as they are worth it.
        exit_layer: None where no early exit is to draft, like draft_tokens: plain decoding, or mode
            auto with n-grams alone.
        tokens_per_s: measured.
        speedup: measured, over plain decoding of the same prompts in turns; 1 for plain itself.
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
        """The same as flags of the command line, which cannot say what mode auto was told of costs."""
        if self.mode == "plain":
            return "--mode plain"
        if self.mode == "auto":
            alone = self.exit_layer is None
            return "--draft-from n-gram" if alone else f"--exit-layer {self.exit_layer}"
        pair = f"--exit-layer {self.exit_layer} --draft-tokens {self.draft_tokens}"
        return f"--mode {self.mode} {pair}"


def is_certain(row: Mapping[str, Any]) -> bool:
    """Whether a measured row is faster than plain decoding: the whole interval of its speedup is."""
    return bool(row["speedup_interval"][0] > 1.0)


def choose(rows: Sequence[Mapping[str, Any]]) -> Choice:
    """Choose from measured rows.

    The fastest of the settings whose speedup's interval is all above 1 is chosen; what may be slower
    than plain decoding is not worth having.

    Args:
        rows: as of `bench.rows.row`, plain decoding first, then at least one other.
    """
    plain, *others = rows
    fastest, gain = _fastest(others)
    pair = f"E={fastest['exit_layer']}, d={fastest['draft_tokens']}"
    if not is_certain(fastest):
        return Choice(
            mode="plain",
            exit_layer=None,
            draft_tokens=None,
            tokens_per_s=plain["tokens_per_s"],
            speedup=1.0,
            speedup_interval=[1.0, 1.0],
            reason=f"plain decoding is best here: the best of the pairs tried, {pair}, runs at {gain}",
        )
    return Choice(
        mode="self-speculative",
        exit_layer=fastest["exit_layer"],
        draft_tokens=fastest["draft_tokens"],
        tokens_per_s=fastest["tokens_per_s"],
        speedup=fastest["speedup"],
        speedup_interval=list(fastest["speedup_interval"]),
        reason=f"self-speculative decoding with {pair} is best here: {gain}",
    )


def choose_auto(
    pairs: Choice, rows: Sequence[Mapping[str, Any]], draft_tokens: Mapping[int, int]
) -> Choice:
    """Mode auto where it is certainly faster than plain decoding, and faster than the pair chosen.

    Args:
        pairs: what `choose` made of the pairs.
        rows: of mode auto, n-grams alone first, then with early exits.
        draft_tokens: the best draft length of each of these exits, for who drafts a fixed one.
    """
    fastest, gain = _fastest(rows)
    exit_layer = fastest["exit_layer"]
    if not is_certain(fastest) or fastest["speedup"] < pairs.speedup:
        # It is what runs unless told otherwise, so whoever reads this should know.
        auto = f"mode auto with {name_of_auto(exit_layer)} comes to {gain}"
        return dataclasses.replace(pairs, reason=f"{pairs.reason}; {auto}")
    fixed = (
        "drafts of a fixed length gain nothing for certain"
        if pairs.mode == "plain"
        else f"E={pairs.exit_layer} with d={pairs.draft_tokens} fixed comes to {pairs.speedup:.2f}x"
    )
    return Choice(
        mode="auto",
        exit_layer=exit_layer,
        draft_tokens=None if exit_layer is None else draft_tokens[exit_layer],
        tokens_per_s=fastest["tokens_per_s"],
        speedup=fastest["speedup"],
        speedup_interval=list(fastest["speedup_interval"]),
        reason=f"mode auto with {name_of_auto(exit_layer)} is best here: {gain}; {fixed}",
    )


def _fastest(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str]:
    """The fastest of those that certainly gain, else of all, and its gain in words."""
    certain = [row for row in rows if is_certain(row)]
    row = max(certain or rows, key=lambda row: float(row["speedup"]))
    low, high = row["speedup_interval"]
    gain = f"{row['speedup']:.2f}x of plain decoding (95% interval {low:.2f} to {high:.2f})"
    return row, gain


def name_of_auto(exit_layer: int | None) -> str:
    """What mode auto drafts with."""
    return "n-grams" if exit_layer is None else f"E={exit_layer}"


_LEAST = 1e-3  # of a plain step: differences of medians can come out at nothing
_LEAST_OF_AN_ANSWER = 8  # tokens: what is shorter stands in other answers, too
_SHARE_OF_VOCABULARY = 4  # a quarter: its first tokens, for a checkpoint that has no list yet


def step_costs(costs: Costs, exit_layer: int, model: LayerSkipModel) -> StepCosts:
    """The costs at the middle context, in plain steps, drafting at one exit through the whole head.

    A pass over n positions is taken to grow with n as the verification from that exit does.
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
        draft_step=max(float(costs.draft_step_s[middle, x]) / plain, _LEAST),
        draft_tokens_scored=model.decoder.architecture.vocab_size,
        head=max(float(costs.head_s[middle]) / plain, _LEAST),
        passes=tuple(float(seconds / verify[0]) for seconds in verify),
        overhead=max(float(costs.round_overhead_s[middle]) / plain, 0.0),
        context=costs.contexts[middle],
    )


def draft_text(answers: Iterable[Sequence[int]], known: Sequence[int] | None) -> tuple[int, ...]:
    """A text, and behind it some answers that it has not, each once."""
    text = _letters(known or ())
    once = dict.fromkeys(tuple(answer) for answer in answers if _letters(answer) not in text)
    return tuple(itertools.chain(known or (), *once))[:MOST_OF_TEXT]


def text_without(
    answers: Iterable[Sequence[int]], known: Sequence[int] | None
) -> tuple[int, ...] | None:
    """A draft text less these answers, which tuning on the same prompts may have put there before."""
    if known is None:
        return None
    text = _letters(known)
    for answer in answers:
        if len(answer) >= _LEAST_OF_AN_ANSWER:
            text = text.replace(_letters(answer), "")
    return tuple(map(ord, text))


def _letters(tokens: Sequence[int]) -> str:
    """A letter for each token, since texts can be searched."""
    return "".join(map(chr, tokens))


def draft_vocabulary(
    texts: Iterable[Sequence[int]], model: LayerSkipModel
) -> tuple[int, ...] | None:
    """The tokens of some prompts and answers, then those that the checkpoint has already.

    A checkpoint without a list gets the first quarter of its vocabulary behind them, since so few texts
    do not have all that answers are made of.
    """
    a = model.decoder.architecture
    counts = Counter(token for text in texts for token in text)
    row = model.decoder.head.weight_bytes / a.vocab_size
    seen = worth_drafting(
        counts,
        row_share=row / model.decoder.weight_bytes,
        vocab_size=a.vocab_size,
        always=sorted(token for token in model.end_tokens if token < a.vocab_size),
    )
    known = model.settings.draft_vocabulary or range(a.vocab_size // _SHARE_OF_VOCABULARY)
    return None if seen is None else tuple(dict.fromkeys([*seen, *known]))[:MOST]


def write_settings(
    folder: Path,
    choice: Choice,
    *,
    end_tokens: Sequence[int],
    record: Mapping[str, Any],
    costs: StepCosts | None = None,
    draft_vocabulary: Sequence[int] | None = None,
    draft_text: Sequence[int] | None = None,
) -> Path:
    """Write `assistant_early_exit` and `num_assistant_tokens`, and how they were found.

    Where transformers cannot draft with the model, the exit is under `layerskip` instead. Where none was
    chosen both fields are removed, so that mode auto drafts from n-grams alone; but not where there are
    costs of other weights or another machine, which the exit may pay with: auto goes by the costs. All
    other fields stay. The file appears whole or not at all.

    Args:
        folder: a checkpoint.
        choice: what to write.
        end_tokens: of the model, for a folder that has no such file yet: transformers would take the
            new file's word that there are none.
        record: kept under `layerskip`, key `tuning`.
        costs: kept there too, in the place of those for the same kind of weights and machine; None
            leaves what is there.
        draft_vocabulary: the same, token ids.
        draft_text: the same.

    Returns:
        The file written.

    Raises:
        ValueError: the file there is no JSON object or a link out of the folder, or the folder cannot be
            written to.
    """
    file = folder / FILE
    check_within(file)
    fields = read_json(file) if file.is_file() else special_tokens(_config(folder), end_tokens)
    # By this mark transformers says that the file only repeats config.json, and skips what is new in it.
    fields.pop("_from_model_config", None)
    own = fields.get(KEY)
    own = {**(own if isinstance(own, dict) else {}), "tuning": dict(record)}
    others = []
    if costs is not None:
        same = [(costs.kind, threads) for threads in (costs.threads, 0)]
        for entry in entries_of(own):
            known = readable_costs(entry)
            if not isinstance(known, StepCosts):  # another version may read them
                others.append(entry)
            elif (known.kind, known.threads) not in same:
                others.append(known.to_dict())
        own["costs"] = [*others, costs.to_dict()]
    if choice.exit_layer is not None or not others:
        for key in ("assistant_early_exit", "num_assistant_tokens"):
            fields.pop(key, None)
        own.pop(EXIT, None)
        if choice.exit_layer is not None and _runs_all_layers(folder):
            own[EXIT] = choice.exit_layer
        elif choice.exit_layer is not None:
            fields["assistant_early_exit"] = choice.exit_layer
        if choice.draft_tokens is not None:
            fields["num_assistant_tokens"] = choice.draft_tokens
    if draft_vocabulary:
        own["draft_vocabulary"] = text_of_ids(draft_vocabulary)
    if draft_text:
        own["draft_text"] = text_of_ids(draft_text)
    fields[KEY] = own
    try:
        replace_json(file, fields)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error}") from error
    return file


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not be written to, before any long work starts.

    Raises:
        ValueError: it cannot be written to, or what is there already is no JSON object, or a link out of
            it.
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
    """Whether transformers does, though it is told of fewer to draft: its `generate` would fail then."""
    return _config(folder).get("model_type") == "gpt_neox"


CANDIDATES = 3  # predictions that are confirmed by real runs
MAX_DRAFT_TOKENS = 16

# What is being done, how much of it is done, and how much there is.
Progress = Callable[[str, int, int], None]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """What was measured, predicted, confirmed and chosen.

    Attributes:
        prompts: how many had an answer of at least two tokens; the others say nothing of decoding.
        skipped: how many were left out: with no token, too long, or with a shorter answer.
        exits: for each exit its agreement with the model's next token over all positions, and the
            acceptance by draft position.
        predicted_plain_tokens_per_s: from the costs alone, like the predictions.
        predictions: every exit and draft length, the fastest predicted first.
        grid: real runs of all of them, each with its prediction; None unless asked for.
        confirmed: real runs in turns, plain decoding first, each with its prediction.
        auto: plain decoding, and mode auto with n-grams alone, and with the exit of the chosen pair or,
            where none was, of each that was confirmed.
        step_costs: for mode auto: costs in plain steps.
        draft_vocabulary: for mode auto: tokens worth drafting, the most frequent first.
        draft_text: for mode auto: a text to search for n-grams, with the answers in it. Auto was tried
            without them, since they are those of these very prompts.
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
    draft_text: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
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
            "draft_text": len(self.draft_text),
        }

    def record(self) -> dict[str, Any]:
        """What stays with the checkpoint: the gain, and where it was measured."""
        chosen = dataclasses.asdict(self.choice)
        names = ("mode", "tokens_per_s", "speedup", "speedup_interval")
        return {
            **{name: chosen[name] for name in names},
            "prompts": self.prompts,
            "max_new_tokens": self.max_new_tokens,
            "environment": self.environment,
        }


def tune(
    model: LayerSkipModel,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = 64,
    max_draft_tokens: int = MAX_DRAFT_TOKENS,
    exits: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    grid: bool = False,
    sweeps: int = SWEEPS,
    progress: Progress = lambda what, done, total: None,
) -> Tuning:
    """Find the fastest exit layer and draft length for these prompts on this machine.

    Args:
        model: as it will be used: its dtype, weights and device are what is tuned for.
        prompts: as for `LayerSkipModel.generate`; at least two.
        max_new_tokens: of each answer, 2 or more.
        max_draft_tokens: draft lengths 1 to this are considered.
        exits: layers run, each 1 ... L - 1; None considers all.
        stop: texts that end an answer.
        grid: also run every pair for real, and confirm the best of those instead.
        sweeps: how often every part is timed; see `effort_for` for what slow models are worth.
        progress: called while it works.

    Raises:
        ValueError: an argument that cannot be used, or too few prompts with an answer.
    """
    layers = _exits(model, exits)
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 2),
        ("max_draft_tokens", max_draft_tokens, 1),
        ("sweeps", sweeps, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}, tuning needs {least} or more")
    useful, continuations = _read_answers(model, prompts, layers, max_new_tokens, stop, progress)
    texts = [[*prompt, *c.token_ids] for prompt, c in zip(useful, continuations, strict=True)]
    costs = measure_costs(
        model.decoder,
        max(texts, key=len),
        contexts=_contexts(continuations),
        exits=layers,
        max_draft_tokens=max_draft_tokens,
        sweeps=sweeps,
        progress=partial(progress, "timing the parts of a round"),
    )
    predictions = predict(costs, continuations, max_draft_tokens)
    plain = predict_plain(costs, continuations)

    def measured(systems: Sequence[LayerSkipSystem], what: str) -> list[Row]:
        entries = measure(
            systems, useful, max_new_tokens=max_new_tokens, progress=partial(progress, what)
        )
        return [row(entry, plain=entries[0].runs) for entry in entries]

    def run_for_real(some: Sequence[Prediction], what: str) -> list[Row]:
        system = LayerSkipSystem(model, [Setting(mode="plain"), *map(_setting, some)], stop=stop)
        predicted = [plain, *(p.tokens_per_s for p in some)]
        return [
            _with_prediction(found, tokens_per_s, plain)
            for found, tokens_per_s in zip(measured([system], what), predicted, strict=True)
        ]

    best, grid_rows = predictions[:CANDIDATES], None
    if grid:
        grid_rows = run_for_real(predictions, "running every pair")
        pairs = zip(predictions, grid_rows[1:], strict=True)
        fastest = sorted(pairs, key=lambda pair: float(pair[1]["speedup"]), reverse=True)
        best = [prediction for prediction, _ in fastest[:CANDIDATES]]
    confirmed = run_for_real(best, "confirming the best by real runs")
    vocabulary = draft_vocabulary(texts, model)
    other_text = text_without((c.token_ids for c in continuations), model.settings.draft_text)
    fixed = choose(confirmed)
    lengths = _best_lengths(best, fixed)
    systems = _auto_systems(model, costs, lengths, vocabulary, other_text, stop)
    auto_rows = measured(systems, "trying mode auto")
    choice = choose_auto(fixed, auto_rows[1:], lengths)
    exit_layer = choice.exit_layer or fixed.exit_layer or best[0].exit_layer
    return Tuning(
        environment=environment_of(model.decoder),
        prompts=len(useful),
        skipped=len(prompts) - len(useful),
        max_new_tokens=max_new_tokens,
        costs=costs,
        exits=[_exit_row(continuations, e, max_draft_tokens) for e in layers],
        predicted_plain_tokens_per_s=plain,
        predictions=predictions,
        grid=grid_rows,
        confirmed=confirmed,
        auto=auto_rows,
        choice=choice,
        step_costs=step_costs(costs, exit_layer, model),
        draft_vocabulary=vocabulary,
        draft_text=draft_text((c.token_ids for c in continuations), other_text),
    )


def _read_answers(
    model: LayerSkipModel,
    prompts: Sequence[Any],
    layers: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[str],
    progress: Progress,
) -> tuple[list[list[int]], list[Continuation]]:
    """The prompts that can be tuned with, as token ids, and what every exit says along their answers."""
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
        progress("reading what every exit says", i, len(tokenized))
    if len(useful) < 2:
        raise ValueError(
            f"{len(useful)} of {len(prompts)} prompts fit into the context and have an answer of two"
            " tokens or more; tuning needs two such prompts at least"
        )
    return useful, continuations


def _best_lengths(best: Sequence[Prediction], fixed: Choice) -> dict[int, int]:
    """Of each exit worth trying in mode auto its draft length, the best exit first."""
    if fixed.exit_layer is not None and fixed.draft_tokens is not None:
        return {fixed.exit_layer: fixed.draft_tokens}
    lengths: dict[int, int] = {}
    for prediction in best:
        lengths.setdefault(prediction.exit_layer, prediction.draft_tokens)
    return lengths


def _auto_systems(
    model: LayerSkipModel,
    costs: Costs,
    draft_tokens: Mapping[int, int],
    vocabulary: tuple[int, ...] | None,
    text: tuple[int, ...] | None,
    stop: Sequence[str],
) -> list[LayerSkipSystem]:
    """Plain decoding, auto with n-grams alone, and auto with each exit, as settings would tell it.

    `draft_tokens` has a length for each exit, the best exit first; `text` is the draft text.
    """
    systems: list[LayerSkipSystem] = []
    best = next(iter(draft_tokens))
    for exit_layer in (None, *draft_tokens):
        settings = dataclasses.replace(
            model.settings,
            exit_layer=exit_layer,
            draft_tokens=None if exit_layer is None else draft_tokens[exit_layer],
            costs=(step_costs(costs, exit_layer or best, model),),
            draft_vocabulary=vocabulary,
            draft_text=text,
        )
        taught = model.with_settings(settings)
        plain, auto = settings_of(taught, modes=("auto",))
        systems.append(LayerSkipSystem(taught, [auto] if systems else [plain, auto], stop=stop))
    return systems


def _exits(model: LayerSkipModel, asked: Sequence[int] | None) -> list[int]:
    n_layers = len(model.decoder.layers)
    layers = sorted(set(range(1, n_layers) if asked is None else asked))
    if not layers:
        raise ValueError("this model has a single layer; there is no exit before the last one")
    if layers[0] < 1 or layers[-1] >= n_layers:
        raise ValueError(f"exit layers for drafting are 1 to {n_layers - 1} in this model")
    return layers


def _contexts(continuations: Sequence[Continuation]) -> list[int]:
    """The shortest and the longest context that a round of these answers has, and their middle."""
    shortest = min(c.prompt_tokens for c in continuations)
    longest = max(c.prompt_tokens + len(c.token_ids) for c in continuations)
    return [shortest, (shortest + longest) // 2, longest]


def _setting(prediction: Prediction) -> Setting:
    return Setting(
        mode="self-speculative",
        exit_layer=prediction.exit_layer,
        draft_tokens=prediction.draft_tokens,
    )


def _with_prediction(measured: Row, tokens_per_s: float, plain_tokens_per_s: float) -> Row:
    """A measured row with what was predicted and by how much that was wrong (0.1: 10% too high)."""
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
