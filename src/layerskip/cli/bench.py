"""`layerskip bench`: modes, and other systems, side by side on a task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerskip.bench.bench import BenchConfig, bench
from layerskip.bench.report import categories, conditions, table, write_report
from layerskip.bench.sandbox import NO_BOUNDARY
from layerskip.bench.tasks import check_task, load_task
from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    config_options,
    model_options,
    note_idle_sampling,
    note_without_effect,
)
from layerskip.cli.output import (
    bars,
    check_outputs,
    check_report,
    deliver,
    escape_control_chars,
    log_stderr,
    run_all,
    waiting,
)

WIDE = 110  # columns of a terminal that has room for all figures on one line


@click.command("bench")
@model_options
@config_options(BenchConfig)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write report.md and its pictures to a folder.",
)
@common_options
def command(report: Path | None, as_json: bool, output: Path | None, **flags: Any) -> None:
    """Measure speed, acceptance, quality and identity of all modes on one task.

    All rows answer the same prompts, interleaved, one at a time, and greedily unless there is a
    --temperature. docs/reference/results.md defines the figures.

    \b
    Examples:
      layerskip bench --task topv2 --model runs/topv2 --exit-layers 8,15 --draft-tokens 2,4
      layerskip bench --task prompts.jsonl --samples 5 --max-new-tokens 64 --json
      layerskip bench --task spec_bench --samples 60 --repeats 3 --report results/spec_bench \\
          --output results/spec_bench.json
      layerskip bench --task humaneval --allow-code-execution --baselines transformers,llama.cpp
      layerskip bench --task spec_bench --temperature 0.7 --top-p 0.9 --modes auto
    """
    config = config_from_flags(BenchConfig, flags)
    model_config = config_from_flags(ModelConfig, flags)
    if not config.task:
        raise click.UsageError("name a task with --task")
    _note_idle_flags(config)
    note_idle_sampling(config.temperature)
    check_outputs({"--output": output}, beside=(model_config.model, config.task))
    check_report(report)
    judged = not config.ignore_eos
    execution = {"allow_code_execution": config.allow_code_execution}
    check_task(config.task, judged=judged, **execution)
    model = config_flags.load_model(model_config)
    with waiting("loading the task"):
        task = load_task(
            config.task,
            samples=config.samples,
            n_shot=config.n_shot,
            seed=config.seed,
            data=config.data,
            chat=model.has_chat_template,
            judged=judged,
            **execution,
        )
    if task.code_execution == "rlimits":
        log_stderr(NO_BOUNDARY)
    with bars() as progress:
        document = bench(model, task, config, source=model_config.model, progress=progress)
    document |= {"n_shot": task.n_shot, "seed": config.seed}
    run_all(
        lambda: None if report is None else write_report(document, report),
        lambda: deliver(document, as_json=as_json, output=output),
        lambda: None if as_json else _show(document),
        lambda: _log_errors(document["rows"]),
    )
    if (failure := document["not_scored"]) is not None:
        what = "measuring ended early" if document["interrupted"] else "could not score the answers"
        raise ValueError(f"{what} ({failure})")
    if document["interrupted"]:
        raise KeyboardInterrupt


def _log_errors(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if "error" in row:
            log_stderr(f"not measured: {row['system']} {row['mode']}: {row['error']}")


def _note_idle_flags(config: BenchConfig) -> None:
    exit_flags = ["draft_vocabulary", "adaptive"]
    if "early-exit" not in config.modes:
        exit_flags.append("exit_layers")
    if "self-speculative" not in config.modes:
        drafts = ("draft_tokens", "draft_from", *exit_flags)
        note_without_effect(drafts, "self-speculative is not among the --modes")
    elif {*config.draft_from} == {"n-gram"}:
        note_without_effect(exit_flags, "drafts from n-grams have no exit")
    if "llama.cpp" not in config.baselines:
        note_without_effect(("gguf_weights",), "llama.cpp is not among the --baselines")


def _show(document: dict[str, Any]) -> None:
    console = Console(highlight=False)
    narrow = console.width < WIDE
    systems = dict.fromkeys(row["system"] for row in document["rows"] if "error" not in row)
    for system in systems:
        lines = table(document, brief_of=system)
        title = f"{system}: {document['model']} on {document['task']}"
        console.print(_table(lines, title, narrow=narrow))
    if len(by_category := categories(document)) > 1:
        console.print(_table(by_category, "speedup (acceptance) by category", narrow=narrow))
    console.print(escape_control_chars("; ".join(conditions(document))), style="dim", markup=False)


def _table(lines: list[list[str]], title: str, *, narrow: bool) -> Table:
    """Return a table whose headings are never cut; `narrow` breaks lines at every space."""
    # Names of categories come from data.
    heading, *rest = [[escape_control_chars(cell) for cell in line] for line in lines]
    result = Table(
        title=escape(escape_control_chars(title)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(heading):
        words = [word for cell in (name, *(line[i] for line in rest)) for word in cell.split()]
        longest = max(map(len, words), default=0)
        result.add_column(
            escape(name),
            justify="right" if i else "left",
            min_width=longest,
            max_width=longest if narrow and i else None,
        )
    for line in rest:
        result.add_row(*map(escape, line))
    return result
