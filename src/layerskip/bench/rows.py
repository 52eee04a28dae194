"""Figures of a row from timed answers, as docs/reference/results.md defines them. Pure functions."""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerskip.bench.measure import Entry, Run
from layerskip.decoding import Sampling
from layerskip.decoding.streaming import accepted_by_position

# Null where a system failed.
_FIGURES = (
    "tokens_per_s",
    "ms_per_token",
    "speedup",
    "acceptance_rate",
    "mean_accepted_length",
    "identical_to_plain",
    "peak_memory_bytes",
    "looping",
    "echoing",
    "speedup_without_loops",
    "copied",
    "speedup_of_copies",
    "speedup_lowest",
)
# Options that all rows share, which the document has.
_SHARED_OPTIONS = (
    *(field.name for field in dataclasses.fields(Sampling)),
    *("max_new_tokens", "seed", "stop", "ignore_eos"),
)
BOOTSTRAP_SAMPLES = 2000
_BOOTSTRAP_CHUNK = 2_000_000  # prompts sampled at once, over all bootstrap samples
REPEATED_TOKENS = 8  # length of an n-gram that counts as repeated or copied
LOOP_SHARE, ECHO_SHARE = 0.5, 0.8
Runs = Sequence[Sequence[Run]]  # by prompt, then by repetition


def row(
    entry: Entry,
    *,
    plain: Runs | None,
    layerskip_plain: Runs | None = None,
    read_bandwidth: float | None = None,
    quality: Callable[[Sequence[str]], dict[str, float]] | None = None,
    categories: Sequence[str | None] = (),
    prompts: Sequence[Sequence[int]] = (),
    may_copy: Sequence[bool] = (),
) -> dict[str, Any]:
    """Return all figures of one entry.

    Args:
        entry: a system in a setting, with its runs.
        plain: runs of the same system's plain decoding on the same prompts; None where it has none.
        layerskip_plain: runs of this package's plain decoding, for the rows of other systems.
        read_bandwidth: bytes per second of this machine.
        quality: maps one text a prompt to metrics.
        categories: one a prompt; with more than one distinct name, figures are given for each too.
        prompts: token ids of each prompt.
        may_copy: for each prompt, whether its answer should copy it.
    """
    config = entry.setting.config
    drafting = config.draft_tokens is not None
    options = {k: v for k, v in config.to_row().items() if k not in _SHARED_OPTIONS}
    head = {
        "system": entry.system.name,
        **options,
        "mode": entry.setting.mode,
        "label": entry.setting.label,
    }
    if entry.error is not None:
        return {**head, **dict.fromkeys(_FIGURES), "quality": {}, "error": entry.error}
    runs = entry.runs
    is_layerskip = entry.system.name == "layerskip"
    figures = {
        **speed(runs),
        **(comparison(runs, plain) if plain else comparison([], [])),
        **(acceptance(runs, reports_drafts=is_layerskip) if drafting else acceptance([])),
        "identical_to_plain": _identical(runs, plain) if plain and config.greedy else None,
        "quality": quality([of_prompt[0].text for of_prompt in runs]) if quality else {},
        "peak_memory_bytes": _highest(runs),
        "share_of_bandwidth": _share_of_bandwidth(runs, read_bandwidth),
        **repetition(runs, plain, prompts, may_copy),
    }
    if layerskip_plain is not None:
        against = comparison(runs, layerskip_plain)
        figures["vs_layerskip_plain"] = against["speedup"]
        figures["vs_layerskip_plain_interval"] = against["speedup_interval"]
        figures["identical_to_layerskip_plain"] = _identical(runs, layerskip_plain)
    if len(set(categories)) > 1:
        figures["categories"] = {
            str(name): _category(entry, plain, [c == name for c in categories])
            for name in dict.fromkeys(categories)
        }
    return {**head, **figures}


def name_of(row: dict[str, Any], *, system: bool = False) -> str:
    """Return the name of a row, such as "self-speculative E=8 d=4"."""
    parts = [row["system"]] if system else []
    parts.append(row["mode"])
    if row.get("label"):
        return " ".join([*parts, row["label"]])
    letters = {"E": "exit_layer", "d": "draft_tokens", "V": "draft_vocabulary"}
    for letter, field in letters.items():
        if row[field] is not None:
            parts.append(f"{letter}={row[field]}")
    if row["mode"] in ("auto", "self-speculative") and row["draft_from"] not in (
        None,
        "early-exit",
    ):
        parts.append(row["draft_from"])
    if row["adaptive"]:
        parts.append("adaptive")
    return " ".join(parts)


def headline(row: dict[str, Any]) -> tuple[float | None, list[float] | None]:
    """Return the speedup to quote of a row, and its interval: that without loops and echoes."""
    rest = "_without_loops" if row.get("looping") or row.get("echoing") else ""
    return row.get(f"speedup{rest}"), row.get(f"speedup{rest}_interval")


def repetition(
    runs: Runs,
    plain: Runs | None,
    prompts: Sequence[Sequence[int]] = (),
    may_copy: Sequence[bool] = (),
) -> dict[str, Any]:
    """Return the shares of answers that loop or echo their prompt, and the speedup of the others.

    Such answers are easy to draft, and a speedup that rests on them says little about useful ones. Where
    copying is the task, answers are no echoes, and have a speedup of their own.
    """
    answers = [of_prompt[0].token_ids for of_prompt in runs]
    pairs = zip(answers, prompts or [()] * len(answers), strict=True)
    copied = [copied_share(answer, prompt) for answer, prompt in pairs]
    loops = [is_loop(answer) for answer in answers]
    copies = [share > ECHO_SHARE for share in copied]
    is_task = may_copy or [False] * len(answers)
    echoes = [copy and not allowed for copy, allowed in zip(copies, is_task, strict=True)]
    kept = [not (loop or echo) for loop, echo in zip(loops, echoes, strict=True)]

    def speedup(chosen: Sequence[bool]) -> dict[str, Any]:
        return (
            comparison(_part(runs, chosen), _part(plain, chosen)) if plain else comparison([], [])
        )

    rest, of_copies = speedup(kept), speedup(copies)
    return {
        "looping": sum(loops) / len(loops),
        "echoing": sum(echoes) / len(echoes),
        "speedup_without_loops": rest["speedup"],
        "speedup_without_loops_interval": rest["speedup_interval"],
        "copied": statistics.fmean(copied),
        "speedup_of_copies": of_copies["speedup"],
        "speedup_of_copies_interval": of_copies["speedup_interval"],
    }


def is_loop(answer: Sequence[int]) -> bool:
    """Return True if repeated n-grams of 8 tokens or more cover over half of the answer."""
    counts = Counter(_ngrams(answer))
    return _coverage(answer, {ngram for ngram, n in counts.items() if n > 1}) > LOOP_SHARE


def is_echo(answer: Sequence[int], prompt: Sequence[int]) -> bool:
    """Return True if over 80% of the answer are copied from the prompt."""
    return copied_share(answer, prompt) > ECHO_SHARE


def copied_share(answer: Sequence[int], prompt: Sequence[int]) -> float:
    """Return the share of the answer in n-grams of 8 tokens or more from the prompt."""
    return _coverage(answer, set(_ngrams(prompt)))


def _ngrams(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    n = REPEATED_TOKENS
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _coverage(tokens: Sequence[int], ngrams: set[tuple[int, ...]]) -> float:
    """Return the share of tokens that are part of one of the n-grams."""
    covered = end = 0
    for start, ngram in enumerate(_ngrams(tokens)):
        if ngram in ngrams:
            covered += start + REPEATED_TOKENS - max(start, end)
            end = start + REPEATED_TOKENS
    return covered / max(len(tokens), 1)


def speed(runs: Runs) -> dict[str, Any]:
    """Return the speed of decoding after the first step, and the time to the first token."""
    tokens, seconds = _decoding(runs)
    timed = tokens > 0
    total = float(tokens.sum() / seconds.sum()) if timed.any() else None
    new_tokens = _new_tokens(runs).sum()
    median = float(np.median(seconds[timed] / tokens[timed])) if timed.any() else None
    return {
        "tokens_per_s": total,
        "tokens_per_s_with_prompt": float(new_tokens / (_first_tokens_s(runs) + seconds).sum()),
        "ms_per_token": None if total is None else 1e3 / total,
        "tokens_per_s_median": None if median is None else 1 / median,
        "ms_per_token_median": None if median is None else 1e3 * median,
        "ttft_s": statistics.median(
            statistics.median(run.ttft_s for run in of_prompt) for of_prompt in runs
        ),
        "new_tokens": int(new_tokens),
    }


def comparison(runs: Runs, plain: Runs) -> dict[str, Any]:
    """Return the speedup over plain decoding, paired by prompt, with 95% intervals over the prompts."""
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

    figures: dict[str, Any] = {}
    for name, ratio in (("speedup", of_totals), ("speedup_mean_of_prompts", mean_of_prompts)):
        figures[name] = float(ratio(columns)) if timed.any() else None
        figures[f"{name}_interval"] = bootstrap_interval(columns, ratio)
    ratios = (columns[0] / columns[1]) / (columns[2] / columns[3])
    figures["speedup_lowest"] = float(ratios.min()) if timed.any() else None
    # The tokens of plain's answer beyond those of this row's first step, at this row's speed.
    remaining_tokens = np.maximum(_new_tokens(plain) - (_new_tokens(runs) - tokens), 0)
    longer = np.divide(remaining_tokens, tokens, out=np.ones_like(seconds), where=timed)
    whole = _first_tokens_s(runs) + seconds * longer
    plain_whole = _first_tokens_s(plain) + plain_seconds
    alike = timed | ((tokens == 0) & (remaining_tokens == 0))
    figures["speedup_with_prompt"] = (
        float(plain_whole[alike].sum() / whole[alike].sum()) if alike.any() else None
    )
    return figures


def _new_tokens(runs: Runs) -> NDArray[np.float64]:
    return np.array([float(len(of_prompt[0].token_ids)) for of_prompt in runs])


def _first_tokens_s(runs: Runs) -> NDArray[np.float64]:
    """Return the seconds to each prompt's first token, medians over the repetitions."""
    return np.array([statistics.median(run.ttft_s for run in of_prompt) for of_prompt in runs])


def bootstrap_interval(
    columns: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
) -> list[float] | None:
    """Return the 95% interval of a statistic over prompts (percentile bootstrap).

    Args:
        columns: [figures, prompts]; a prompt's figures are resampled together, which pairs them.
        statistic: [figures, ..., prompts] to [...].

    Returns:
        [low, high], deterministic; None with fewer than two prompts.
    """
    n = columns.shape[1]
    if n < 2:
        return None
    random = np.random.default_rng(0)
    chunk = max(_BOOTSTRAP_CHUNK // n, 1)  # thousands of prompts would take gigabytes
    values = [
        statistic(columns[:, random.integers(n, size=(min(chunk, BOOTSTRAP_SAMPLES - start), n))])
        for start in range(0, BOOTSTRAP_SAMPLES, chunk)
    ]
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return [float(low), float(high)]


def acceptance(runs: Runs, *, reports_drafts: bool = True) -> dict[str, Any]:
    """Return counts over the rounds of the first repetition; None where drafts are not reported.

    Args:
        runs: of one entry.
        reports_drafts: False for systems that report no drafts, or only accepted ones.
    """
    first = [of_prompt[0] for of_prompt in runs]
    rounds = [step for run in first for step in run.steps[1:]]
    drafted, accepted = (sum(getattr(s, n) for s in rounds) for n in ("drafted", "accepted"))
    reports_drafts = reports_drafts or drafted > 0
    return {
        "rounds": len(rounds),
        "drafted": drafted if reports_drafts else None,
        "accepted": accepted if reports_drafts else None,
        "acceptance_rate": accepted / drafted if drafted else None,
        "accepted_by_position": accepted_by_position(rounds),
        "accepted_by_source": dict(
            Counter(source for s in rounds for source in s.sources[: s.accepted])
        ),
        "mean_accepted_length": (
            sum(run.decoded_tokens for run in first) / len(rounds) if rounds else None
        ),
    }


def _part(runs: Runs, kept: Sequence[bool]) -> Runs:
    return [of_prompt for of_prompt, is_kept in zip(runs, kept, strict=True) if is_kept]


def _category(entry: Entry, plain: Runs | None, kept: Sequence[bool]) -> dict[str, Any]:
    config, runs = entry.setting.config, _part(entry.runs, kept)
    figures: dict[str, Any] = {"samples": len(runs), "tokens_per_s": speed(runs)["tokens_per_s"]}
    if plain:
        plain = _part(plain, kept)
        figures |= comparison(runs, plain)
        figures["identical_to_plain"] = _identical(runs, plain) if config.greedy else None
    counts = acceptance(runs if config.draft_tokens is not None else [])
    return figures | {n: counts[n] for n in ("acceptance_rate", "mean_accepted_length")}


def _decoding(runs: Runs) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return for each prompt the tokens after the first step, and the seconds that they took.

    The tokens are the first repetition's, the seconds per token the median over the repetitions.
    """
    tokens = np.array([of_prompt[0].decoded_tokens for of_prompt in runs], dtype=np.float64)
    seconds_per_token = [
        statistics.median(run.decode_s / max(run.decoded_tokens, 1) for run in of_prompt)
        for of_prompt in runs
    ]
    return tokens, tokens * np.array(seconds_per_token, dtype=np.float64)


def _identical(runs: Runs, plain: Runs) -> float:
    pairs = zip(runs, plain, strict=True)
    return sum(run[0].token_ids == other[0].token_ids for run, other in pairs) / len(runs)


def _highest(runs: Runs) -> int | None:
    peaks = [run.peak_memory_bytes for of_prompt in runs for run in of_prompt]
    return max((peak for peak in peaks if peak is not None), default=None)


def _share_of_bandwidth(runs: Runs, read_bandwidth: float | None) -> float | None:
    """Return the bytes of weights read per second over the memory's read bandwidth."""
    if not read_bandwidth:
        return None
    all_runs = [run for of_prompt in runs for run in of_prompt]
    seconds = sum(run.decode_s for run in all_runs)
    if not seconds or any(run.weight_bytes_read is None for run in all_runs):
        return None
    return sum(run.weight_bytes_read or 0 for run in all_runs) / seconds / read_bandwidth
