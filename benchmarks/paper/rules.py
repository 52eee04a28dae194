"""The rules by which the paper's claims are judged: rows of results to a finding. Pure functions."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """Result of a criterion, with the figures that it compared.

    `gap`: relative difference of the two deciding figures; None = unknown.
    """

    holds: bool
    figures: str
    gap: float | None = None


_ROUNDING = 1e-9  # 0.859 - 0.829 is more than 0.03


def perplexities(exits: Sequence[Row]) -> dict[int, float]:
    """Exit -> perplexity a token; one too large for a number is infinite."""
    values = {row["exit_layer"]: row["token_perplexity"] for row in exits}
    return {e: math.inf if value is None else value for e, value in values.items()}


def _nearest(values: Mapping[int, Any], layer: float) -> int:
    return min(values, key=lambda e: (abs(e - layer), e))


def lower_in_the_middle(some: Sequence[Row], others: Sequence[Row]) -> Finding:
    """Check that all exits from L/4 to 3L/4 have a lower perplexity."""
    ours, theirs = perplexities(some), perplexities(others)
    layers = max(ours)
    middle = [e for e in ours if layers / 4 <= e <= 3 * layers / 4]
    at = _nearest(ours, layers / 2)
    figures = f"E = {at} of {layers}: {ours[at]:,.1f} against {theirs[at]:,.1f}"
    return Finding(all(ours[e] < theirs[e] for e in middle), figures)


def last_at_most(some: Sequence[Row], others: Sequence[Row], factor: float) -> Finding:
    ours, theirs = perplexities(some), perplexities(others)
    last = max(ours)
    ratio = ours[last] / theirs[last]
    # The change of the rounded figures, so that a reader gets the same from the page.
    change = round(ours[last], 2) / round(theirs[last], 2) - 1
    figures = f"{ours[last]:.2f} against {theirs[last]:.2f} ({change:+.1%})"
    return Finding(ratio <= factor, figures, abs(ratio - 1))


def last_of_both_at_most(one: Row, other: Row, factor: float) -> Finding:
    """The last layer on the text it was trained on the like of, and on the code."""
    found = {name: last_at_most(one[name], other[name], factor) for name in ("text", "code")}
    figures = "; ".join(f"{name}: {finding.figures}" for name, finding in found.items())
    return Finding(all(finding.holds for finding in found.values()), figures)


def both_parts(both: Row, dropout: Row, loss: Row) -> Finding:
    values = [perplexities(row["exits"]) for row in (both, dropout, loss)]
    at = _nearest(values[0], max(values[0]) / 2)
    ours, *alone = (exits[at] for exits in values)
    figures = f"E = {at}: LD+EE {ours:.1f}, LD {alone[0]:.1f}, EE {alone[1]:.1f}"
    return Finding(ours < min(alone), figures, abs(min(alone) / ours - 1))


def best(rows: Sequence[Row], at_least: float) -> Finding:
    """Check that self-speculative decoding reaches a speedup at some (E, d)."""
    row = max(rows, key=_speedup)
    low, high = row["speedup_interval"] or (0.0, 0.0)
    figures = (
        f"{_speedup(row):.2f}x ({low:.2f} to {high:.2f}) at E = {row['exit_layer']},"
        f" d = {row['draft_tokens']}"
    )
    return Finding(_speedup(row) >= at_least, figures)


def _speedup(row: Row) -> float:
    return float(row["speedup"] or 0.0)  # none where all answers end with their first token


def code_acceptance(row: Row) -> Finding | None:
    exits = {one["exit_layer"]: one for one in row["exits"]}
    at = _nearest(exits, row["layers"] * 6 / 32)
    rates = {d["draft_tokens"]: d["acceptance_rate"] for d in exits[at]["by_draft_tokens"]}
    if rates.get(12) is None:
        return None
    return Finding(rates[12] >= 0.45, f"{rates[12]:.1%} at E = {at}, d = 12")


def only_after(before: Row, control: Row, after: Row) -> Finding:
    untrained, without, trained = (best(row["timed"], 1.1) for row in (before, control, after))
    figures = (
        f"before {untrained.figures}; without the recipe {without.figures}; after {trained.figures}"
    )
    return Finding(trained.holds and not (untrained.holds or without.holds), figures)


def with_a_loss(row: Row, kind: str, field: str) -> dict[int, float]:
    """Exit -> a figure, of the exits that had a loss in training: the others say nothing of it."""
    recipe = row["trained"].get("recipe", {})
    in_turn = recipe.get("exits") or range(row["layers"])
    named = {*recipe.get("fixed_exits", ())}
    named |= {*(() if recipe.get("curriculum") == "none" else in_turn)}
    return {one["exit_layer"]: one[field] or 0.0 for one in row[kind] if one["exit_layer"] in named}


def earlier_is_faster(row: Row) -> Finding | None:
    speeds = with_a_loss(row, "timed", "speedup")
    if len(speeds) < 3:  # two points make no trend
        return None
    figures = ", ".join(f"E = {e}: {speeds[e]:.2f}x" for e in sorted(speeds))
    in_order = [speeds[e] for e in sorted(speeds)]
    return Finding(in_order == sorted(in_order, reverse=True), figures)


def task_acceptance(row: Row) -> Finding:
    rates = with_a_loss(row, "exits", "acceptance_rate")
    at = _nearest(rates, row["layers"] / 4)
    rate = rates[at]
    return Finding(rate >= 0.76, f"{rate:.1%} at E = {at}, d = {row['draft_tokens']}")


def cost_of_the_recipe(recipe: Row, control: Row) -> Finding:
    ours, theirs = recipe["exact_match"], control["exact_match"]
    return Finding(
        theirs - ours <= 0.03 + _ROUNDING, f"{ours:.1%} against {theirs:.1%} of the control"
    )


def early_exact_match(row: Row) -> Finding:
    matches = with_a_loss(row, "exits", "exact_match")
    at = _nearest(matches, row["layers"] * 3 / 4)
    early, last = matches[at], row["exact_match"]
    return Finding(
        early >= last - 0.01 - _ROUNDING, f"E = {at}: {early:.1%}, last layer: {last:.1%}"
    )


def share_saved(row: Row) -> float:
    """Of the time a token, the median over repetitions: both ways took turns in each."""
    ms = row["ms_per_token_of_repeats"]
    return statistics.median(1 - a / b for a, b in zip(ms["with"], ms["without"], strict=True))


def saved(*rows: Row) -> Finding:
    shares = [share_saved(row) for row in rows]
    same = all(share == 1 for row in rows for share in row["identical_to_plain"].values())
    figures = f"{min(shares):.1%} to {max(shares):.1%} over {len(rows)} pairs (E, d)"
    return Finding(same and min(shares) >= 0.05, figures + ("" if same else "; other tokens"))


def from_scratch(*rows: Row) -> Finding | None:
    timed = [
        one for row in rows if row["trained"].get("regime") == "pretrain" for one in row["timed"]
    ]
    return best(timed, 2.16) if timed else None


def long_drafts(*rows: Row) -> Finding | None:
    """Of checkpoints that drafting pays for at all."""
    pairs = [(_fastest(row, range(4, 13)), _fastest(row, range(1, 4))) for row in rows]
    pairs = [pair for pair in pairs if max(map(_speedup, pair)) > 1]
    if not pairs:
        return None
    figures = ", ".join(
        f"{_speedup(long):.2f}x at d = {long['draft_tokens']},"
        f" {_speedup(short):.2f}x at d = {short['draft_tokens']}"
        for long, short in pairs
    )
    gains = [_speedup(long) / _speedup(short) - 1 for long, short in pairs]
    return Finding(min(gains) > 0, f"fastest: {figures}", min(map(abs, gains)))


def _fastest(row: Row, lengths: range) -> Row:
    return max((one for one in row["timed"] if one["draft_tokens"] in lengths), key=_speedup)


def lossless(*rows: Row) -> Finding:
    shares = [one["identical_to_plain"] for row in rows for one in row["timed"]]
    more = "" if min(shares) == 1 else " or more"
    figures = f"{min(shares):.1%}{more} of the outputs, {len(shares)} settings"
    return Finding(min(shares) == 1, figures)


def compared(rule: Callable[..., Finding], key: str, *more: Any) -> Callable[..., Finding]:
    """A judge of two rows by the exits under a key."""
    return lambda one, other: rule(one[key], other[key], *more)
