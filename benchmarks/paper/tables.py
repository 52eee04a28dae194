"""The tables of each experiment's rows, in Markdown."""

from collections.abc import Callable, Sequence

from layerskip.bench.report import markdown_table
from paper.rules import Row, share_saved


def pretrain(rows: Sequence[Row]) -> list[str]:
    """Perplexity of every exit."""
    return ["Perplexity a token on held-out files, by exit E:", _by_exit(rows, "exits")]


def continual(rows: Sequence[Row]) -> list[str]:
    """Perplexity of exits on both texts."""
    return [
        "Perplexity a token on the test part of WikiText-2, by exit E:",
        _by_exit(rows, "text"),
        "Perplexity a token on held-out code:",
        _by_exit(rows, "code"),
    ]


def domain(rows: Sequence[Row]) -> list[str]:
    """What each exit is worth as a drafter."""
    first = rows[0]
    intro = (
        f"{first['samples']} prompts of {first['task']}, at most {first['max_new_tokens']} new tokens,"
        " greedy. Speedup is over plain decoding of the same checkpoint in the same run."
    )
    return [intro, *_drafting(rows)]


def speculation(rows: Sequence[Row]) -> list[str]:
    """Acceptance and speedup over d."""
    return _drafting(rows)


def task(rows: Sequence[Row]) -> list[str]:
    """Exact match and speed of every exit, and the control's exact match."""
    lines = [["variant", "E", "exact match", "agreement", "accepted", "tokens a round", "speedup"]]
    for row in rows:
        lines.append([row["variant"], "L", _share(row["exact_match"]), "", "", "", ""])
        speed = {one["exit_layer"]: one["speedup"] for one in row.get("timed", ())}
        for one in row.get("exits", ()):
            shares = (one[k] for k in ("exact_match", "agreement", "acceptance_rate"))
            length, at = f"{one['mean_accepted_length']:.2f}", one["exit_layer"]
            cells = [*map(_share, shares), length, _times(speed.get(at))]
            lines.append([row["variant"], str(at), *cells])
    lengths = sorted({row["draft_tokens"] for row in rows if "draft_tokens" in row})
    drafted = f"d = {', '.join(map(str, lengths))}. " if lengths else ""
    return [f"{drafted}Exact match at an exit is that of early exit alone.", markdown_table(lines)]


def kvq(rows: Sequence[Row]) -> list[str]:
    """Milliseconds a token with and without reuse."""
    lines = [
        [
            "pair",
            "with reuse, ms a token",
            "without",
            "saved (median of repetitions)",
            "plain decoding's answers",
        ]
    ]
    for row in rows:
        ms = [f"{row['ms_per_token'][name]:.2f}" for name in ("with", "without")]
        same = _share(min(row["identical_to_plain"].values()))
        lines.append([f"{row['task']}, {row['variant']}", *ms, _share(share_saved(row)), same])
    return [markdown_table(lines)]


TABLES: dict[str, Callable[[Sequence[Row]], list[str]]] = {
    "pretrain": pretrain,
    "continual": continual,
    "domain": domain,
    "task": task,
    "kvq": kvq,
    "speculation": speculation,
}


def _by_exit(rows: Sequence[Row], key: str) -> str:
    exits = sorted({one["exit_layer"] for row in rows for one in row[key]})
    lines = [["variant", *map(str, exits)]]
    for row in rows:
        found = {one["exit_layer"]: one["token_perplexity"] for one in row[key]}
        lines.append([row["variant"], *(_perplexity(found.get(e)) for e in exits)])
    return markdown_table(lines)


def _drafting(rows: Sequence[Row]) -> list[str]:
    lengths = sorted(
        {d["draft_tokens"] for row in rows for one in row["exits"] for d in one[_BY_D]}
    )
    accepted = [["row", "E", "agreement", *(f"d = {d}" for d in lengths)]]
    faster = [["row", "E", *(f"d = {d}" for d in lengths)]]
    for row in rows:
        for one in row["exits"]:
            rates = {d["draft_tokens"]: d["acceptance_rate"] for d in one[_BY_D]}
            head = [row["variant"], str(one["exit_layer"])]
            cells = [_share(rates.get(d)) for d in lengths]
            accepted.append([*head, _share(one["agreement"]), *cells])
        speed = {(t["exit_layer"], t["draft_tokens"]): t["speedup"] for t in row["timed"]}
        for e in sorted({e for e, _ in speed}):
            cells = [_times(speed.get((e, d))) for d in lengths]
            faster.append([row["variant"], str(e), *cells])
    said = [["row", "new tokens", "at most", "quality"]]
    for row in rows:
        most = row["samples"] * row["max_new_tokens"]
        quality = (f"{name} {value:.1%}" for name, value in row["plain"]["quality"].items())
        said.append(
            [row["variant"], str(row["plain"]["new_tokens"]), str(most), ", ".join(quality)]
        )
    return [
        "The answers, of plain decoding; where they have as many tokens as there may be, none has"
        " ended by itself:",
        markdown_table(said),
        "Share of drafts that are accepted; agreement is the share of positions on the model's own "
        "answers at which the exit's top token is the last layer's:",
        markdown_table(accepted),
        "Speedup:",
        markdown_table(faster),
    ]


_BY_D = "by_draft_tokens"


def _perplexity(value: float | None) -> str:
    if value is None:
        return "above all numbers"
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"
