"""The whole of tuning: answers, costs, predictions, real runs, and the choice."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from layerskip.bench.environment import environment_of
from layerskip.bench.measure import Setting, measure
from layerskip.bench.own import OwnSystem, settings_of
from layerskip.bench.rows import row
from layerskip.decoding import LayerSkipModel
from layerskip.decoding.generation import accepted_by_position
from layerskip.model import StepCosts
from layerskip.tuning.acceptance import Continuation, agreement_rate, read_agreement, replay
from layerskip.tuning.choose import Choice, choose, choose_auto
from layerskip.tuning.costs import SWEEPS, Costs, measure_costs
from layerskip.tuning.for_auto import draft_text, draft_vocabulary, step_costs, text_without
from layerskip.tuning.predict import Prediction, predict, predict_plain

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

    def measured(systems: Sequence[OwnSystem], what: str) -> list[Row]:
        entries = measure(
            systems, useful, max_new_tokens=max_new_tokens, progress=partial(progress, what)
        )
        return [row(entry, plain=entries[0].runs) for entry in entries]

    def run_for_real(some: Sequence[Prediction], what: str) -> list[Row]:
        system = OwnSystem(model, [Setting(mode="plain"), *map(_setting, some)], stop=stop)
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
) -> list[OwnSystem]:
    """Plain decoding, auto with n-grams alone, and auto with each exit, as settings would tell it.

    `draft_tokens` has a length for each exit, the best exit first; `text` is the draft text.
    """
    systems: list[OwnSystem] = []
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
        systems.append(OwnSystem(taught, [auto] if systems else [plain, auto], stop=stop))
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
