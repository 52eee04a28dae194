"""Define the speed targets, and compare the results of `speed.py` with them."""

from collections.abc import Iterator, Mapping
from typing import Any

from layerskip.bench.report import conditions, markdown_table, table
from layerskip.model.hub import TRAINED_MODEL

Part = Mapping[str, Any]

SHARE_OF_CEILING = 0.8
OVER_LLAMA_CPP = 1.0  # plain over plain, same precision
AUTO_OVER_PLAIN = 2.2  # trained checkpoints, unquantized and int8
AUTO_OVER_PLAIN_IN = {"humaneval": 1.9, "mbpp": 1.9, "cnn_dm": None}
BUILT_IN_OVER_PLAIN_IN = {**AUTO_OVER_PLAIN_IN, "topv2": 2.5}
AUTO_OVER_LLAMA_CPP = 2.0  # over its plain decoding, and over its prompt lookup
AUTO_OVER_EARLY_EXIT = 4.0  # over transformers' best
AUTO_ON_SUMMARIES = 1.2  # untrained
AUTO_AT_LEAST = 0.97  # of plain, whatever the task
MEMORY_OVER_PLAIN = 1.02
START_UP_S = 4.0
SUMMARIES = ("cnn_dm", "xsum")


def target_table(parts: Mapping[str, Part]) -> list[dict[str, Any]]:
    """Return one entry for each target and case, with `wanted`, `reached` and `met`.

    `wanted` is None for a figure that is only reported; `at_most` marks upper limits. Figures that were
    not measured have no entry.

    Args:
        parts: the parts of a `speed.py` result by name; those with an `error` are skipped.
    """
    well = {name: part for name, part in parts.items() if "error" not in part}
    benches = {name: part for name, part in well.items() if "rows" in part}
    lines = [
        _line(goal, name, wanted, reached)
        for name, part in benches.items()
        for goal, wanted, reached in _of_bench(part)
        if reached is not None
    ]
    if speedups := _auto_speedups(benches):
        worst = min(speedups, key=lambda name: speedups[name])
        lines.append(_line("auto / plain, worst case", worst, AUTO_AT_LEAST, speedups[worst]))
    for name, part in well.items():
        if "over_plain" in part:
            goal = "peak memory, auto / plain"
            lines.append(_line(goal, name, MEMORY_OVER_PLAIN, part["over_plain"], at_most=True))
        if "seconds_with_compilation" in part:
            compiling = part["seconds_with_compilation"]
            lines.append(_line("start-up, s", name, START_UP_S, part["seconds"], at_most=True))
            lines.append(_line("start-up with compilation, s", name, None, compiling, at_most=True))
    return lines


def report(result: Mapping[str, Any], picture: str | None) -> str:
    """Format a result as Markdown.

    Args:
        result: the document written by `speed.py`.
        picture: file name of the plotted curves, beside the report.
    """
    e = result["environment"]
    heading = ["figure", "case", "target", "measured", "met"]
    lines = [[*_cells(goal)] for goal in result["goals"]]
    texts = [
        "# Speed",
        f"`{e['command']}`, commit {e['commit']}, {e['date']}; {e['cpu']}, {e['threads']} threads,"
        f" PyTorch {e['torch']}",
        "## Targets",
        markdown_table([heading, *lines]),
        "The share of the ceiling counts weights only, not the KV cache of long prompts.",
        *([f"![Curves]({picture})"] if picture else []),
    ]
    for name, part in result["parts"].items():
        if "error" in part:
            texts += [f"## {name}", f"`{part['command']}` failed: {part['error']}"]
        elif "rows" in part:
            setup = "\n".join(f"- {phrase}" for phrase in conditions(part))
            texts += [f"## {name}", f"`{part['command']}`", setup, markdown_table(table(part))]
            texts += [
                f"{row['system']} {row['mode']}: {row['error']}"
                for row in part["rows"]
                if "error" in row
            ]
    return "\n\n".join(texts) + "\n"


def _auto_speedups(benches: Mapping[str, Part]) -> dict[str, float]:
    """Speedups of mode auto by task, and by category where a task has several."""
    speedups = {}
    for name, part in benches.items():
        if row := _row(part, "layerskip", "auto"):
            speedups[name] = row["speedup"]
            for category, figures in row.get("categories", {}).items():
                speedups[f"{name}, {category}"] = figures.get("speedup")
    return {name: speedup for name, speedup in speedups.items() if speedup}


def _of_bench(part: Part) -> Iterator[tuple[str, float | None, float | None]]:
    """Yield name, target and measured value."""
    plain, auto = (_row(part, "layerskip", mode) for mode in ("plain", "auto"))
    llama = _row(part, "llama.cpp", "plain")
    lookup = _row(part, "llama.cpp", "prompt-lookup")
    early_exit = _row(part, "transformers", "self-speculative", _WHOLE)
    weights = part["environment"]["weights"]
    if weights == "16bit" and plain:
        yield "plain, share of the ceiling", SHARE_OF_CEILING, plain["share_of_bandwidth"]
    yield "plain / llama.cpp plain", OVER_LLAMA_CPP, _ratio(plain, llama)
    if not auto:
        return
    if auto["exit_layer"] is not None:  # trained to draft by early exit
        is_built_in = part.get("model") == TRAINED_MODEL
        goals = BUILT_IN_OVER_PLAIN_IN if is_built_in else AUTO_OVER_PLAIN_IN
        wanted = goals.get(part["task"], AUTO_OVER_PLAIN)
        yield "auto / plain", wanted if weights in ("16bit", "int8") else None, auto["speedup"]
        yield "auto / llama.cpp plain", AUTO_OVER_LLAMA_CPP, _ratio(auto, llama)
        yield "auto / llama.cpp prompt lookup", AUTO_OVER_LLAMA_CPP, _ratio(auto, lookup)
        goal = "auto / transformers' best assistant_early_exit, whole answers"
        yield goal, AUTO_OVER_EARLY_EXIT, _ratio(auto, early_exit, _WHOLE)
        return
    goal = "untrained, auto / plain on summaries"
    if part["task"] in SUMMARIES:
        yield goal, AUTO_ON_SUMMARIES, auto["speedup"]
    elif category := auto.get("categories", {}).get("summarization"):
        yield goal, AUTO_ON_SUMMARIES, category.get("speedup")


# The first step of transformers' early exit yields several tokens, so compare whole outputs.
_WHOLE = "tokens_per_s_with_prompt"


def _row(part: Part, system: str, mode: str, by: str = "tokens_per_s") -> dict[str, Any] | None:
    """Return the fastest row of a system in a mode, without ablation rows."""
    rows = [
        row
        for row in part["rows"]
        if (row["system"], row["mode"], row["label"]) == (system, mode, None) and row.get(by)
    ]
    return max(rows, key=lambda row: row[by], default=None)


def _ratio(
    row: dict[str, Any] | None, other: dict[str, Any] | None, by: str = "tokens_per_s"
) -> float | None:
    """Ratio of tokens/s; the rows were interleaved on the same prompts."""
    return row[by] / other[by] if row and other and row.get(by) else None


def _line(
    goal: str, case: str, wanted: float | None, reached: float, *, at_most: bool = False
) -> dict[str, Any]:
    met = None
    if wanted is not None:
        met = reached <= wanted if at_most else reached >= wanted
    return {
        "goal": goal,
        "case": case,
        "wanted": wanted,
        "reached": reached,
        "at_most": at_most,
        "met": met,
    }


def _cells(goal: Mapping[str, Any]) -> Iterator[str]:
    yield from (goal["goal"], goal["case"])
    sign = "at most" if goal["at_most"] else "at least"
    yield "" if goal["wanted"] is None else f"{sign} {goal['wanted']:.2f}"
    yield f"{goal['reached']:.2f}"
    yield {None: "", True: "yes", False: "no"}[goal["met"]]
