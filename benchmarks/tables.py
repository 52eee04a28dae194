"""Write the tables of docs/benchmarks.md, docs/exit-adapters.md and CONTRIBUTING.md from the results.

    python benchmarks/tables.py

A table stands between `<!--table:NAME-->` and `<!--end-->`. Under each table are its result files,
their dates, and the command that repeats the measurement (`--output FILE` is left out).
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from index import RESULTS, entry

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / page for page in ("docs/benchmarks.md", "docs/exit-adapters.md", "CONTRIBUTING.md")
)
BLOCK = re.compile(r"(<!--table:([\w-]+)-->\n).*?(<!--end-->)", re.DOTALL)
WEIGHTS = {"16bit": "bfloat16", "stored": "as stored"}
WITH_PROMPT = "tokens_per_s_with_prompt"
TASKS = {"topv2": "TOPv2", "spec_bench": "Spec-Bench", "edits": "edits of Python files"}
Line = list[str]


@dataclass(frozen=True)
class Table:
    """A table: its result files by name, the command that makes them, and their documents to lines."""

    files: tuple[str, ...]
    command: str
    lines: Callable[..., list[Line]]


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """Return a page with its tables written again."""
    return BLOCK.sub(lambda block: f"{block[1]}{rendered(TABLES[block[2]])}{block[3]}", text)


def rendered(table: Table, folder: Path = RESULTS) -> str:
    """Return a table in Markdown with its origin."""
    paths = [folder / f"{name}.json" for name in table.files]
    heading, *rest = table.lines(*(json.loads(p.read_text(encoding="utf-8")) for p in paths))
    lines = [heading, ["---"] * len(heading), *rest]
    origins = [
        f"`benchmarks/results/{n}.json` ({origin(p)})"
        for n, p in zip(table.files, paths, strict=True)
    ]
    rows = "\n".join(f"|{'|'.join(line)}|" for line in lines)
    return f"\n{rows}\n\n{'; '.join(origins)}: `{table.command}`\n\n"


def origin(path: Path) -> str:
    """Return the date and, if it is not the pages' usual one, the machine of a result."""
    about = entry(path)
    if "EPYC" not in about["cpu"]:
        return f"{about['date']}, Intel Xeon"
    is_zen_5 = str(about["cpu_model"]).startswith("family 26,")
    return f"{about['date']}, Zen 5" if is_zen_5 else about["date"]


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def percent(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def with_interval(row: dict[str, Any]) -> str:
    """Return the speedup over outputs that do not loop, and its interval over prompts."""
    interval = row.get("speedup_without_loops_interval")
    text = times(row["speedup_without_loops"])
    return f"{text} ({interval[0]:.2f}-{interval[1]:.2f})" if interval else text


def sources(row: dict[str, Any]) -> str:
    """Return the number of accepted tokens of each draft source, the most first."""
    counts = sorted(row["accepted_by_source"].items(), key=lambda item: -item[1])
    return ", ".join(f"{source} {count}" for source, count in counts)


def demo(document: dict[str, Any]) -> list[Line]:
    lines = [["scene", "outputs", "plain, tokens/s", "`auto`", "speedup", "accepted drafts"]]
    for scene in document["scenes"]:
        plain, auto = scene["rows"][:2]
        lines.append(
            [
                scene["task"],
                str(scene["samples"]),
                f"{plain['tokens_per_s']:.0f}",
                f"{auto['tokens_per_s']:.0f}",
                times(auto["speedup_without_loops"]),
                sources(auto),
            ]
        )
    return lines


def demo_train(document: dict[str, Any]) -> list[Line]:
    lines = [["", "valid JSON", "exact match", "agreement of the exit", "exit alone", "`auto`"]]
    for task in document["tasks"]:
        n = task["samples"]
        auto, *alone = task["rows"][1:]
        lines.append(
            [
                task["task"],
                f"{task['valid']} of {n}",
                f"{task['exact']} of {n}",
                percent(task["agreement"]) if alone else "",
                with_interval(alone[0]) if alone else "",
                with_interval(auto),
            ]
        )
    return lines


def quality(recipe: dict[str, Any], control: dict[str, Any]) -> list[Line]:
    """Rows of a trained checkpoint and its control; see checkpoint.py."""
    lines = [["", "exact match", "agreement with the last layer", "drafts accepted, d = 4"]]
    for name, document in (("last layer", recipe), ("control without the recipe", control)):
        (task,) = document["checkpoint"]["tasks"].values()
        lines.append([name, percent(task["quality"]["exact_match"]), "", ""])
        lines += [exit_line(row) for row in task.get("exits", ())]
    return lines


def exit_line(row: dict[str, Any]) -> Line:
    rates = (row.get("exact_match"), row["agreement"], row["acceptance_rate"])
    return [f"exit {row['exit_layer']} alone", *map(percent, rates)]


def exits(document: dict[str, Any]) -> list[Line]:
    """Rows of a checkpoint trained with several exits and of its control; see paper/task.py."""
    by_variant = {row["variant"]: row for row in document["rows"]}
    recipe, control = by_variant["recipe"], by_variant["control"]
    drafts = f"drafts accepted, d = {recipe['draft_tokens']}"
    return [
        ["", "exact match", "agreement with the last layer", drafts],
        ["last layer", percent(recipe["exact_match"]), "", ""],
        *(exit_line(row) for row in recipe["exits"]),
        ["control without the recipe", percent(control["exact_match"]), "", ""],
    ]


def speed(document: dict[str, Any]) -> list[Line]:
    """Rows by system, columns by weights: tokens/s, and speedup over the system's plain decoding."""
    measured = [part for part in document["parts"].values() if "error" not in part]
    parts = {part["environment"]["weights"]: part["rows"] for part in measured}
    by_name: dict[str, dict[str, str]] = {}
    for weights, rows in parts.items():
        for row in rows:
            if row.get("tokens_per_s"):
                gain = {"plain": "", "auto": f", {with_interval(row)}"}
                default = f", {times(row['speedup_without_loops'])}"
                cell = f"{row['tokens_per_s']:.0f}{gain.get(row['label'] or row['mode'], default)}"
                by_name.setdefault(system_name(row), {})[weights] = cell
    names = [WEIGHTS.get(weights, weights) for weights in parts]
    cells = [[name, *(row.get(w, "") for w in parts)] for name, row in by_name.items()]
    return [["tokens/s, speedup", *names], *cells]


def system_name(row: dict[str, Any]) -> str:
    setting = row["label"] or row["mode"]
    if row["mode"] in ("self-speculative", "prompt-lookup", "early-exit"):
        numbers = {"E": row["exit_layer"], "d": row["draft_tokens"]}
        setting += "".join(f", {key} = {value}" for key, value in numbers.items() if value)
    return f"{row['system']}, {setting}"


def predictions(document: dict[str, Any]) -> list[Line]:
    """Speed with predicted outputs that are mostly right, and with wrong ones."""
    lines = [["prediction", "drafts from", "tokens/s", "speedup", "lowest", "accepted"]]
    for row in document["rows"]:
        sources = (row["draft_from"] or "none").replace("+", ", ")
        gain = times(row["speedup_lowest"]), percent(row["acceptance_rate"], 0)
        kind = row["prediction"] or "none"
        lines.append([kind, sources, f"{row['tokens_per_s']:.1f}", with_interval(row), *gain])
    return lines


def edits(*documents: dict[str, Any]) -> list[Line]:
    lines = [
        [
            "weights",
            "prompts",
            "plain, tokens/s",
            "`auto`",
            "speedup",
            "lowest",
            "with prefill",
            "copied",
        ]
    ]
    for document in documents:
        plain, auto = document["rows"][:2]
        weights = document["environment"]["weights"]
        lines.append(
            [
                WEIGHTS.get(weights, weights),
                str(document["samples"]),
                f"{plain['tokens_per_s']:.1f}",
                f"{auto['tokens_per_s']:.1f}",
                with_interval(auto),
                times(auto["speedup_lowest"]),
                times(auto["speedup_with_prompt"]),
                percent(auto["copied"], 0),
            ]
        )
    return lines


def llama_cpp(*documents: dict[str, Any]) -> list[Line]:
    """Tokens/s of plain decoding and of drafts in both programs, a line for each run."""
    columns = ("llama.cpp, plain", "its best drafts", "`auto` over the faster", "with prefill")
    lines = [["task", "weights", "prompts", "plain", "`auto`", *columns]]
    for run in itertools.chain.from_iterable(map(runs_of, documents)):
        plain, auto = (
            next(row for row in run["rows"] if row["mode"] == mode) for mode in ("plain", "auto")
        )
        other, *drafting = (row for row in run["rows"] if row["system"] == "llama.cpp")
        drafts = max(drafting, key=tokens_per_s)
        best = fastest(run, "llama.cpp")
        weights = run["environment"]["weights"]
        lines.append(
            [
                TASKS[run["task"]],
                WEIGHTS.get(weights, weights),
                str(run["samples"]),
                *(f"{tokens_per_s(row):.0f}" for row in (plain, auto, other)),
                f"{tokens_per_s(drafts):.0f} ({system_name(drafts).removeprefix('llama.cpp, ')})",
                times(over(auto, best)),
                times(auto[WITH_PROMPT] / best[WITH_PROMPT]),
            ]
        )
    return lines


def runs_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the runs of `layerskip bench` in a result."""
    return [run for run in document.get("parts", {"": document}).values() if "rows" in run]


def fastest(run: dict[str, Any], system: str) -> dict[str, Any]:
    """Return the fastest row of a system; {} without one."""
    rows = [row for row in run["rows"] if row.get("system") == system and "error" not in row]
    return max(rows, key=tokens_per_s, default={})


def over(row: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the speedup of a row, without outputs that loop, over a row of another system."""
    return float(row["speedup_without_loops"] / other["vs_layerskip_plain"])


def tokens_per_s(row: dict[str, Any]) -> float:
    return float(row["tokens_per_s"])


def stored(document: dict[str, Any]) -> list[Line]:
    """Medians over rounds of both programs on the same file."""
    lines = [
        ["file", "decoding, tokens/s", "llama.cpp", "prefill", "llama.cpp", "memory", "load, s"]
    ]
    for name, both in document["files"].items():
        ours, theirs = both["layerskip"], dict(both["llama.cpp"])
        for key, value in both.get("llama-bench", {}).items():  # the faster build
            theirs[key] = max(theirs[key], value)
        decode, prefill = "decode tokens/s", "prefill tokens/s"
        lines.append(
            [
                name,
                f"{ours[decode]:.1f}",
                f"{theirs[decode]:.1f} ({times(both[f'{decode}, ratio'])})",
                f"{ours[prefill]:,.0f}",
                f"{theirs[prefill]:,.0f} ({times(both[f'{prefill}, ratio'])})",
                times(both["resident bytes, ratio"]),
                f"{ours['load s']:.1f}, {theirs['load s']:.1f}",
            ]
        )
    return lines


def batching(document: dict[str, Any]) -> list[Line]:
    lines = [["model, task", "rows", "plain, tokens/s", "`auto`", "ratio of runs", "equal outputs"]]
    for row in document["results"]:
        speeds = [f"{row[f'{mode}_tokens_per_s']:.0f}" for mode in ("plain", "auto")]
        name = f"{row['model']}, {TASKS[row['task']]}"
        ratio, equal = times(row["auto_over_plain"]), str(row["equal_answers"])
        lines.append([name, str(row["rows"]), *speeds, ratio, equal])
    return lines


def structured(document: dict[str, Any]) -> list[Line]:
    lines = [["", "passes", "tokens", "tokens/s", "speedup", "accepted drafts"]]
    for name, row in document["results"].items():
        speedup = "" if name == "plain" else times(row["speedup_over_plain"])
        accepted = sources({"accepted_by_source": row["accepted"]})
        figures = (row["passes"], row["tokens"], round(row["tokens_per_s"]))
        lines.append([name, *map(str, figures), speedup, accepted])
    return lines


def exactness(*documents: dict[str, Any]) -> list[Line]:
    vllm, pytorch, gguf, demo = documents
    lines = [["outputs", "compared with", "identical"]]
    rows = [row for scene in demo["scenes"] for row in scene["rows"][1:]]
    scenes = min(row["identical_to_plain"] for row in rows)
    lines.append(["CPU kernels, `auto`, the three scenes", "plain", percent(scenes, 0)])
    for row in vllm["rows"]:
        if "identical_to_plain" in row:
            same = f"{row['identical_to_plain']} of {row['prompts']}"
            lines.append([f"vLLM, float32, batch {row['batch']}", "plain vLLM", same])
    for row in gguf["rows"]:
        same = f"{row['equal']} of {row['positions']}"
        lines.append([f"{row['model']}, float32, tokens", "llama.cpp, 8-bit activations", same])
    for row in pytorch["rows"]:
        name = f"PyTorch without the kernels, bfloat16, E = {row['exit_layer']}"
        lines.append([name, "plain", percent(row["identical_to_plain"], 0)])
    return lines


def vllm(*documents: dict[str, Any]) -> list[Line]:
    """Rows by mode, columns by batch size: tokens a CPU second on a busy machine.

    On an idle one tokens a second, and memory.
    """
    rows = [row for document in documents for row in document["rows"]]
    idle = all("tokens_per_s" in row for row in rows)
    unit = "tokens_per_s" if idle else "tokens_per_cpu_s"
    plain = {row["batch"]: row[unit] for row in rows if row["mode"] == "plain"}
    lines: dict[str, Line] = {}
    memory: dict[str, Line] = {}
    for row in rows:
        name = row["mode"] + ", table by batch size" * isinstance(row["draft_tokens"], list)
        gain = "" if row["mode"] == "plain" else f" ({times(row[unit] / plain[row['batch']])})"
        lines.setdefault(name, [name]).append(f"{row[unit]:.0f}{gain}")
        memory[name] = [f"{row['rss_mb']:,}", f"{row['kv_cache_tokens']:,}"] if idle else []
    heading = "tokens/s" if idle else "tokens per CPU second"
    columns = ["memory, MB", "KV cache, tokens"] if idle else []
    return [
        [heading, *(f"batch {n}" for n in plain), *columns],
        *(line + memory[name] for name, line in lines.items()),
    ]


def adapter(document: dict[str, Any]) -> list[Line]:
    lines = [
        ["minutes", "tokens of the teacher", "agreement at draft token 1, 2, 3, 4", "accepted"]
    ]
    *evaluations, last = document["evaluations"]
    for one in [*evaluations[::5], last]:
        rates = ", ".join(map(percent, one["agreement_by_depth"]))
        accepted = f"{one['accepted_of_a_round']:.2f}"
        lines.append([f"{one['minutes']:.1f}", f"{one['tokens']:,}", rates, accepted])
    return lines


SOURCES = {"n-gram": "n-grams", "exit-adapter": "adapter", "exit-adapter+n-gram": "both"}


def speedups_by_source(document: dict[str, Any]) -> list[str]:
    """Speedup over plain decoding of each of `SOURCES`, without outputs that loop."""
    rows = {row["draft_from"]: row for row in document["rows"]}
    return [with_interval(rows[source]) for source in SOURCES]


def adapter_speed(document: dict[str, Any]) -> list[Line]:
    """Speedup by draft source, a line for each task and precision of weights."""
    lines = [["prompts", "number", "weights", *SOURCES.values()]]
    for task, by_weights in document["tasks"].items():
        for weights, part in by_weights.items():
            line = [task, str(part["samples"]), WEIGHTS.get(weights, weights)]
            lines.append([*line, *speedups_by_source(part)])
    return lines


def adapter_qwen(*documents: dict[str, Any]) -> list[Line]:
    """Speedup by draft source, a line for each task and precision of weights."""
    lines = [["task", "prompts", "weights", *SOURCES.values(), "accepted, both"]]
    for one in documents:
        task = {"humaneval": "HumanEval", "mbpp": "MBPP"}[one["task"]]
        weights = one["environment"]["weights"]
        line = [task, str(one["samples"]), WEIGHTS.get(weights, weights)]
        both = next(row for row in one["rows"] if row["draft_from"] == "exit-adapter+n-gram")
        lines.append([*line, *speedups_by_source(one), percent(both["acceptance_rate"], 0)])
    return lines


def adapter_ablation(document: dict[str, Any]) -> list[Line]:
    """Size, cost and agreement of the variants."""
    columns = "parameters", "cost of a draft", "tokens, passes"
    lines = [["variant", *columns, "held out, token 1, 2", "Spec-Bench, token 1, 2", "accepted"]]
    for row in document["rows"]:
        rates = [", ".join(map(percent, row[k][:2])) for k in ("agreement_held_out", "agreement")]
        cost = f"{row['parameters']:,}", f"{row['bytes_of_a_draft']:.3f}"
        seen = f"{row['tokens']:,}, {row['passes']:,}"
        lines.append([row["variant"], *cost, seen, *rates, f"{row['accepted_of_4']:.2f}"])
    return lines


def quantization(document: dict[str, Any], *checkpoints: dict[str, Any]) -> list[Line]:
    lines = [["", "weights", "change of the NLL", "exact match", "drafts accepted at exit 7"]]
    for row in document["rows"]:
        name = WEIGHTS.get(row["weights"], row["weights"])
        lines.append([document["model"], name, f"{row['relative_change']:+.2%}", "", ""])
    names = ("bfloat16", "int4, GPTQ", "int4, nearest")
    for name, one in zip(names, checkpoints, strict=True):
        task = one["checkpoint"]["tasks"]["topv2"]
        (exit_,) = task["exits"]
        rates = map(percent, (task["quality"]["exact_match"], exit_["acceptance_rate"]))
        lines.append(["trained on TOPv2", name, "", *rates])
    return lines


def busy_cores(document: dict[str, Any]) -> list[Line]:
    """Tokens/s beside busy processes by number of threads."""
    choices = list(document["rows"][0]["tokens/s"])
    names = ["1 thread", *(f"{n} threads" for n in choices[1:-1]), "chosen"]
    lines = [["", "busy processes", *names]]
    for row in document["rows"]:
        speeds = [row["tokens/s"][choice] for choice in choices]
        lines.append([row["work"], str(row["busy"]), *(f"{s:,.0f}" for s in speeds)])
    return lines


def long_context(document: dict[str, Any]) -> list[Line]:
    """Tokens/s by context; in parentheses the share of the memory bandwidth."""
    contexts = list(dict.fromkeys(row["context"] for row in document["rows"]))
    lines: dict[tuple[str, str], Line] = {}
    for row in document["rows"]:
        key = row["system"], row["kv_cache"]
        share = row.get("bandwidth_share")
        text = f"{row['tokens_per_s']:.0f}" + (f" ({share:.0%})" if share else "")
        lines.setdefault(key, [", ".join(key)]).append(text)
    return [["tokens/s", *(f"{n:,}" for n in contexts)], *lines.values()]


def serve(document: dict[str, Any]) -> list[Line]:
    """Two rows for each task and system, columns by the number of clients, then by arrivals."""
    by_row: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in document["rows"]:
        load = f"{row['clients']:g} clients" if "clients" in row else f"{row['rate']:g} requests/s"
        by_row.setdefault((row["task"], row["system"]), {})[load] = row
    loads = list(dict.fromkeys(load for by_load in by_row.values() for load in by_load))
    lines = [["", *loads]]
    for (task, system), by_load in by_row.items():
        for key, name in (("tokens_per_s", "tokens/s"), ("ttft_ms_p95", "first token, ms (p95)")):
            figures = (f"{by_load[load][key]:.0f}" if load in by_load else "" for load in loads)
            lines.append([f"{TASKS.get(task, task)}, {system}, {name}", *figures])
    return lines


def checkouts(document: dict[str, Any]) -> list[Line]:
    """New tokens/s over old."""
    columns = list(dict.fromkeys((row["task"], row["mode"]) for row in document["rows"]))
    lines = [["weights", *(f"{TASKS[task]}, {mode}" for task, mode in columns)]]
    for weights in dict.fromkeys(row["weights"] for row in document["rows"]):
        ratios = {
            (row["task"], row["mode"]): row["ratio"]
            for row in document["rows"]
            if row["weights"] == weights
        }
        lines.append([WEIGHTS.get(weights, weights), *(times(ratios[one]) for one in columns)])
    return lines


def constants(document: dict[str, Any]) -> list[Line]:
    """Predicted speedups with each constant at a smaller and a larger value."""
    defaults, *rows = document["rows"]
    lines = [["constant", "smaller", "larger"], ["all defaults", outcome(defaults), ""]]
    for smaller, larger in zip(rows[::2], rows[1::2], strict=True):
        name = smaller["constant"]
        default = setting(document["defaults"][name])
        cells = [f"{setting(row['value'])}: {outcome(row)}" for row in (smaller, larger)]
        lines.append([f"`{name}` {default}", *cells])
    return lines


def setting(value: Any) -> str:
    return f"({', '.join(map(setting, value))})" if isinstance(value, list) else f"{value:g}"


def outcome(row: dict[str, Any]) -> str:
    return ", ".join(map(times, row["speedup"].values()))


TABLES = {
    "demo": Table(("demo",), "layerskip demo", demo),
    "demo-train": Table(("demo-train",), "layerskip demo --train --minutes 10", demo_train),
    "topv2-checkpoint": Table(
        ("topv2-checkpoint", "topv2-control"),
        "python benchmarks/checkpoint.py smollm2-135m-topv2 topv2 --rows 2300"
        " --unseen '$LAYERSKIP_DATA/topv2/*_train.tsv*' --exits 7 --early-exit --weights stored",
        quality,
    ),
    "topv2-speed": Table(
        ("topv2-speed",),
        "python benchmarks/speed.py --model smollm2-135m-topv2 --task topv2",
        speed,
    ),
    "llama-cpp": Table(
        ("topv2-speed", "edits-baselines", "edits-baselines-stored", "spec-bench-speed"),
        "python benchmarks/speed.py --model MODEL --task TASK --baselines llama.cpp;"
        " python benchmarks/edits.py edits --model MODEL --baselines llama.cpp",
        llama_cpp,
    ),
    "edits": Table(
        ("edits-bfloat16", "edits-int8"),
        "python benchmarks/edits.py edits --model qwen2.5-coder-0.5b.gguf",
        edits,
    ),
    "predictions": Table(
        ("predictions",),
        "python benchmarks/edits.py predictions --model qwen2.5-coder-0.5b.gguf",
        predictions,
    ),
    "stored-weights": Table(
        ("stored-weights",), "python benchmarks/stored_weights.py FILES", stored
    ),
    "busy-cores": Table(("busy-cores",), "python benchmarks/busy_cores.py", busy_cores),
    "long-context": Table(("long-context",), "python benchmarks/long_context.py", long_context),
    "batching": Table(("batching",), "python benchmarks/batching.py", batching),
    "structured-output": Table(
        ("structured-output",), "python benchmarks/structured_output.py", structured
    ),
    "exactness": Table(
        ("vllm-exactness-float32", "exactness-bfloat16", "gguf-models", "demo"),
        "python benchmarks/quality.py exactness --no-compile",
        exactness,
    ),
    "exits": Table(("paper/task",), "PYTHONPATH=benchmarks python -m paper.task", exits),
    "adapter-speed": Table(
        ("adapter-speed",),
        "layerskip bench --model smollm2-135m --task TASK --sources",
        adapter_speed,
    ),
    "adapter-qwen": Table(
        (
            "adapter-qwen-humaneval",
            "adapter-qwen-humaneval-int8",
            "adapter-qwen-mbpp",
            "adapter-qwen-mbpp-int8",
        ),
        "layerskip bench --model qwen2.5-coder-0.5b.gguf --adapter qwen --task TASK --sources",
        adapter_qwen,
    ),
    "adapter-ablation": Table(
        ("adapter-ablation",), "python benchmarks/adapter_ablation.py", adapter_ablation
    ),
    "adapter": Table(("adapter-training",), "layerskip adapt --model smollm2-135m", adapter),
    "quantization": Table(
        ("quantization", "topv2-bfloat16", "topv2-int4-gptq", "topv2-int4-nearest"),
        "python benchmarks/quality.py weights",
        quantization,
    ),
    "vllm": Table(
        ("vllm-tokens-per-s",),
        "python benchmarks/vllm_modes.py --model TARGET --draft DRAFT",
        vllm,
    ),
    "serve-load": Table(
        ("serve-load",),
        "python benchmarks/serve.py --model smollm2-135m-topv2 --task topv2 --rates 2,8",
        serve,
    ),
    "serve-load-spec-bench": Table(
        ("serve-load-spec-bench",),
        "python benchmarks/serve.py --task spec_bench --clients 1,4,16 --rates 0.5",
        serve,
    ),
    "serve-load-vllm": Table(
        ("serve-load-vllm",),
        "python benchmarks/serve.py --model smollm2-135m-topv2 --systems layerskip,vllm"
        " --vllm-python PYTHON",
        serve,
    ),
    "checkouts": Table(
        ("redesign-speed",), "python benchmarks/compare_checkouts.py ../old", checkouts
    ),
    "constants": Table(("draft-constants",), "python benchmarks/draft_constants.py", constants),
}


if __name__ == "__main__":
    main()
