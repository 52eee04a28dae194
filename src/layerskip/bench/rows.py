"""From timed answers to the figures of a row. Pure functions; docs/bench.md defines every figure."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerskip.bench.measure import Entry, Run
from layerskip.decoding.generation import accepted_by_position

# Null where a system failed.
_OF_EVERY_ROW = (
    "tokens_per_s",
    "ms_per_token",
    "speedup",
    "acceptance_rate",
    "mean_accepted_length",
    "identical_to_plain",
    "peak_memory_bytes",
)
BOOTSTRAP_SAMPLES = 2000
_DRAWN_AT_ONCE = 2_000_000  # prompts, all samples together
Runs = Sequence[Sequence[Run]]  # by prompt, then by repetition


def row(
    entry: Entry,
    *,
    plain: Runs | None,
    layerskip_plain: Runs | None = None,
    read_bandwidth: float | None = None,
    quality: Callable[[Sequence[str]], dict[str, float]] | None = None,
    categories: Sequence[str | None] = (),
    drawn: bool = False,
) -> dict[str, Any]:
    """All figures of one entry.

    Args:
        entry: a system in a setting, with its runs.
        plain: runs of the same system's plain decoding on the same prompts; None where it has none.
        layerskip_plain: runs of this package's plain decoding, for the rows of other systems.
        read_bandwidth: bytes per second of this machine.
        quality: from one text a prompt to metrics.
        categories: one a prompt; with more than one distinct name, figures are given for each too.
        drawn: whether answers are sampled, so that those of two rows need not be the same.
    """
    drafting = entry.setting.draft_tokens is not None
    head = {
        "system": entry.system.name,
        "mode": entry.setting.mode,
        "exit_layer": entry.setting.exit_layer,
        "draft_tokens": entry.setting.draft_tokens,
        "draft_from": entry.setting.draft_from if drafting else None,
        "adaptive": entry.setting.adaptive,
        "draft_vocabulary": entry.setting.draft_vocabulary,
        "label": entry.setting.label,
    }
    if entry.error is not None:
        return {**head, **dict.fromkeys(_OF_EVERY_ROW), "quality": {}, "error": entry.error}
    runs = entry.runs
    is_own = entry.system.name == "layerskip"
    figures = {
        **speed(runs),
        **(comparison(runs, plain) if plain else comparison([], [])),
        **(acceptance(runs, is_own=is_own) if drafting else acceptance([])),
        "identical_to_plain": _identical(runs, plain) if plain and not drawn else None,
        "quality": quality([of_prompt[0].text for of_prompt in runs]) if quality else {},
        "peak_memory_bytes": _highest(runs),
        "share_of_bandwidth": _share_of_bandwidth(runs, read_bandwidth),
    }
    if layerskip_plain is not None:
        against = comparison(runs, layerskip_plain)
        figures["vs_layerskip_plain"] = against["speedup"]
        figures["vs_layerskip_plain_interval"] = against["speedup_interval"]
        figures["identical_to_layerskip_plain"] = _identical(runs, layerskip_plain)
    if len(set(categories)) > 1:
        figures["categories"] = {
            str(name): _category(runs, plain, drafting, drawn, [c == name for c in categories])
            for name in dict.fromkeys(categories)
        }
    return {**head, **figures}


def name_of(row: dict[str, Any], *, system: bool = False) -> str:
    """A row's setting in words, such as "self-speculative E=8 d=4"."""
    parts = [row["system"]] if system else []
    parts.append(row["mode"])
    if row.get("label"):
        return " ".join([*parts, row["label"]])
    letters = {"E": "exit_layer", "d": "draft_tokens", "V": "draft_vocabulary"}
    for letter, field in letters.items():
        if row[field] is not None:
            parts.append(f"{letter}={row[field]}")
    if row["draft_from"] not in (None, "early-exit", row["mode"]):
        parts.append(row["draft_from"])
    if row["adaptive"]:
        parts.append("adaptive")
    return " ".join(parts)


def speed(runs: Runs) -> dict[str, Any]:
    """Speed of decoding over all prompts that have more than a first step, and time to first token."""
    tokens, seconds = _decoding(runs)
    timed = tokens > 0
    total = float(tokens.sum() / seconds.sum()) if timed.any() else None
    new_tokens = _new_tokens(runs).sum()
    a_token = float(np.median(seconds[timed] / tokens[timed])) if timed.any() else None
    return {
        "tokens_per_s": total,
        "tokens_per_s_with_prompt": float(new_tokens / (_first_tokens_s(runs) + seconds).sum()),
        "ms_per_token": None if total is None else 1e3 / total,
        "tokens_per_s_median": None if a_token is None else 1 / a_token,
        "ms_per_token_median": None if a_token is None else 1e3 * a_token,
        "ttft_s": statistics.median(
            statistics.median(run.ttft_s for run in of_prompt) for of_prompt in runs
        ),
        "new_tokens": int(new_tokens),
    }


def comparison(runs: Runs, plain: Runs) -> dict[str, Any]:
    """Speed over plain decoding's, paired by prompt, with 95% intervals over the prompts."""
    tokens, seconds = _decoding(runs)
    plain_tokens, plain_seconds = _decoding(plain)
    timed = (tokens > 0) & (plain_tokens > 0)
    columns = np.stack([tokens, seconds, plain_tokens, plain_seconds])[:, timed]

    def of_totals(sample: NDArray[np.float64]) -> NDArray[np.float64]:
        n, s, plain_n, plain_s = sample.sum(axis=-1)
        return np.asarray((n / s) / (plain_n / plain_s))

    def mean_of_prompts(sample: NDArray[np.float64]) -> NDArray[np.float64]:
        n, s, plain_n, plain_s = sample
        return np.asarray(((n / s) / (plain_n / plain_s)).mean(axis=-1))

    found: dict[str, Any] = {}
    for name, ratio in (("speedup", of_totals), ("speedup_mean_of_prompts", mean_of_prompts)):
        found[name] = float(ratio(columns)) if timed.any() else None
        found[f"{name}_interval"] = bootstrap_interval(columns, ratio)
    # What plain's answer has beyond as many tokens as this row's first step gave.
    left = np.maximum(_new_tokens(plain) - (_new_tokens(runs) - tokens), 0)
    longer = np.divide(left, tokens, out=np.ones_like(seconds), where=timed)
    whole = _first_tokens_s(runs) + seconds * longer
    plain_whole = _first_tokens_s(plain) + plain_seconds
    alike = timed | ((tokens == 0) & (left == 0))
    found["speedup_with_prompt"] = (
        float(plain_whole[alike].sum() / whole[alike].sum()) if alike.any() else None
    )
    return found


def _new_tokens(runs: Runs) -> NDArray[np.float64]:
    return np.array([float(len(of_prompt[0].token_ids)) for of_prompt in runs])


def _first_tokens_s(runs: Runs) -> NDArray[np.float64]:
    """Seconds to each prompt's first token, the median over the repetitions."""
    return np.array([statistics.median(run.ttft_s for run in of_prompt) for of_prompt in runs])


def bootstrap_interval(
    columns: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> list[float] | None:
    """The middle 95% of a statistic over prompts drawn with replacement (percentile bootstrap).

    Args:
        columns: [figures, prompts]; a prompt's figures are drawn together, which is the pairing.
        statistic: [figures, ..., prompts] to [...].

    Returns:
        [low, high], the same for the same figures; None with fewer than two prompts.
    """
    n = columns.shape[1]
    if n < 2:
        return None
    random = np.random.default_rng(0)
    at_once = max(_DRAWN_AT_ONCE // n, 1)  # or thousands of prompts would take gigabytes
    found = [
        statistic(columns[:, random.integers(n, size=(min(at_once, BOOTSTRAP_SAMPLES - start), n))])
        for start in range(0, BOOTSTRAP_SAMPLES, at_once)
    ]
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return [float(low), float(high)]


def acceptance(runs: Runs, *, is_own: bool = True) -> dict[str, Any]:
    """Counts over the rounds of the first repetition; None where drafts are not told.

    Args:
        runs: of one entry.
        is_own: whether this package drafted; others tell of drafts, if at all, when some were accepted.
    """
    first = [of_prompt[0] for of_prompt in runs]
    rounds = [step for run in first for step in run.steps[1:]]
    drafted, accepted = (sum(getattr(s, n) for s in rounds) for n in ("drafted", "accepted"))
    told = is_own or drafted > 0
    return {
        "rounds": len(rounds),
        "drafted": drafted if told else None,
        "accepted": accepted if told else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_by_position": accepted_by_position(rounds),
        "mean_accepted_length": (
            sum(run.decoded_tokens for run in first) / len(rounds) if rounds else None
        ),
    }


def _category(
    runs: Runs, plain: Runs | None, drafting: bool, drawn: bool, belongs: Sequence[bool]
) -> dict[str, Any]:
    def part(some: Runs) -> Runs:
        return [x for x, is_in in zip(some, belongs, strict=True) if is_in]

    own = part(runs)
    figures: dict[str, Any] = {"samples": len(own), "tokens_per_s": speed(own)["tokens_per_s"]}
    if plain:
        figures |= comparison(own, part(plain))
        figures["identical_to_plain"] = None if drawn else _identical(own, part(plain))
    counts = acceptance(own if drafting else [])
    return figures | {n: counts[n] for n in ("acceptance_rate", "mean_accepted_length")}


def _decoding(runs: Runs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each prompt the tokens after the first step, and the seconds that they took.

    The seconds a token are the median over the repetitions; the tokens are the first repetition's.
    """
    tokens = np.array([of_prompt[0].decoded_tokens for of_prompt in runs], dtype=np.float64)
    a_token = [
        statistics.median(run.decode_s / max(run.decoded_tokens, 1) for run in of_prompt)
        for of_prompt in runs
    ]
    return tokens, tokens * np.array(a_token, dtype=np.float64)


def _identical(runs: Runs, plain: Runs) -> float:
    pairs = zip(runs, plain, strict=True)
    return sum(own[0].token_ids == other[0].token_ids for own, other in pairs) / len(runs)


def _highest(runs: Runs) -> int | None:
    peaks = [run.peak_memory_bytes for of_prompt in runs for run in of_prompt]
    known = [peak for peak in peaks if peak is not None]
    return max(known, default=None)


def _share_of_bandwidth(runs: Runs, read_bandwidth: float | None) -> float | None:
    """Bytes of weights read a second over those that the memory can deliver."""
    if not read_bandwidth:
        return None
    all_runs = [run for of_prompt in runs for run in of_prompt]
    seconds = sum(run.decode_s for run in all_runs)
    if not seconds or any(run.weight_bytes_read is None for run in all_runs):
        return None
    return sum(run.weight_bytes_read or 0 for run in all_runs) / seconds / read_bandwidth
