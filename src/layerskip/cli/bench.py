"""`layerskip bench`: modes, and peers, side by side on a task."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerskip.bench.baselines import BASELINES
from layerskip.bench.bench import BenchConfig, bench
from layerskip.bench.report import categories, conditions, table, write_report
from layerskip.bench.sandbox import NO_BOUNDARY
from layerskip.bench.systems import BENCH_MODES
from layerskip.bench.tasks import check_task, load_task
from layerskip.cli import config_flags as options
from layerskip.cli import config_flags as values
from layerskip.cli import output as outputs
from layerskip.cli.output import bars, escape_control_chars, log_stderr
from layerskip.decoding import Sampling
from layerskip.decoding.policy import DRAFT_SOURCES
from layerskip.export import GGUF_WEIGHTS

WIDE = 110  # columns of a terminal that has room for every figure on one line


def _list_of(kind: Any) -> Any:
    """A callback that reads values of a kind with commas between them."""

    def parse(ctx: click.Context, param: click.Parameter, text: str) -> tuple[Any, ...]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return tuple(dict.fromkeys(kind.convert(part, param, ctx) for part in parts))

    return parse


@click.command("bench")
@options.model_options
@click.option(
    "--task",
    "task_name",
    required=True,
    metavar="T",
    help="A task's name (see docs/tasks.md), or a .jsonl or text file of prompts.",
)
@click.option("--data", metavar="FOLDER", help="Where data sets are; also LAYERSKIP_DATA.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=20, show_default=True, help="How many prompts."
)
@click.option("--n-shot", type=click.IntRange(min=0), help="Examples before each prompt.")
@click.option(
    "--seed",
    type=values.SEED,
    default=0,
    show_default=True,
    help="Which prompts are drawn, and which tokens with --temperature.",
)
@options.sampling_options
@click.option(
    "--modes",
    "--mode",
    "modes",
    callback=_list_of(click.Choice(BENCH_MODES)),
    default=",".join(BENCH_MODES),
    show_default=True,
    metavar="MODE,...",
    help="Plain is measured in any case.",
)
@click.option(
    "--exit-layers",
    "--exit-layer",
    "exit_layers",
    callback=values.layers,
    metavar="4,8,12-20",
    help="Exit layers for early exit and for drafts. Default: the checkpoint's, else a quarter.",
)
@click.option(
    "--draft-tokens",
    callback=_list_of(click.IntRange(min=0)),
    default="",
    metavar="d,...",
    help="Draft lengths. Default: the checkpoint's, else 5.",
)
@click.option(
    "--draft-from",
    callback=_list_of(click.Choice(DRAFT_SOURCES)),
    default="early-exit",
    show_default=True,
    metavar="SOURCE,...",
    help=f"Where drafts come from: {', '.join(DRAFT_SOURCES)}.",
)
@click.option(
    "--draft-vocabulary",
    callback=_list_of(click.IntRange(min=1)),
    default="",
    metavar="N,...",
    help="Add rows whose early exit may draft N tokens alone, through a shorter head.",
)
@click.option(
    "--adaptive",
    is_flag=True,
    help="Add a row for each exit layer whose drafts end where another token is not worth its cost.",
)
@click.option(
    "--ablation",
    is_flag=True,
    help="Add rows of auto without each of its parts, and of each part alone.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", help="Default: the task's."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How often all prompts are gone through.",
)
@click.option(
    "--ignore-eos",
    is_flag=True,
    help="All answers go on to --max-new-tokens; they are not scored then.",
)
@click.option(
    "--allow-code-execution",
    is_flag=True,
    help="Allow humaneval and mbpp to run the Python code that the model writes (docs/tasks.md).",
)
@click.option(
    "--peers",
    callback=_list_of(click.Choice(list(BASELINES))),
    default="",
    metavar="PEER,...",
    help=f"Other systems on the same weights: {', '.join(BASELINES)}.",
)
@click.option(
    "--gguf-weights",
    type=click.Choice(list(GGUF_WEIGHTS)),
    help="Precision of the file that llama.cpp gets. Default: that of --weights and --dtype.",
)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write report.md and its pictures there.",
)
@options.common_options
def command(
    task_name: str,
    data: str | None,
    samples: int,
    n_shot: int | None,
    seed: int,
    allow_code_execution: bool,
    report: Path | None,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Measure speed, acceptance, quality and identity of all modes on one task.

    All rows answer the same prompts, one at a time and greedily unless there is a --temperature, and
    take turns on each prompt. Figures are defined in docs/bench.md.

    \b
    Examples:
      layerskip bench --task topv2 --model runs/topv2 --exit-layers 8,15 --draft-tokens 2,4
      layerskip bench --task prompts.jsonl --samples 5 --max-new-tokens 64 --json
      layerskip bench --task spec_bench --samples 60 --repeats 3 --report results/spec_bench \\
          --output results/spec_bench.json
      layerskip bench --task humaneval --allow-code-execution --peers transformers,llama.cpp
      layerskip bench --task spec_bench --temperature 0.7 --top-p 0.9 --modes auto
    """
    _note_idle_flags(flags["modes"], flags["draft_from"], flags["peers"])
    options.note_idle_sampling(flags)
    outputs.check_outputs({"--output": output}, beside=(flags["model"], task_name))
    outputs.check_report(report)
    flags["exit_layers"] = flags["exit_layers"] or ()
    flags["sampling"] = Sampling(**{f.name: flags[f.name] for f in dataclasses.fields(Sampling)})
    known = {**flags, "seed": seed}
    try:
        config = BenchConfig(**{f.name: known[f.name] for f in dataclasses.fields(BenchConfig)})
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    check_task(task_name, judged=not config.ignore_eos, allow_code_execution=allow_code_execution)
    model = options.load_model(flags)
    with options.warnings_in_one_line(), options.waiting("loading the task"):
        task = load_task(
            task_name,
            samples=samples,
            n_shot=n_shot,
            seed=seed,
            data=data,
            chat=model.has_chat_template,
            judged=not config.ignore_eos,
            allow_code_execution=allow_code_execution,
        )
    if task.code_execution == "rlimits":
        log_stderr(NO_BOUNDARY)
    with bars() as progress:
        document = bench(model, task, config, source=flags["model"], progress=progress)
    document |= {"n_shot": task.n_shot, "seed": seed}
    with contextlib.ExitStack() as told:  # backwards, and each where another cannot be written
        told.callback(_tell_of_errors, document["rows"])
        if not as_json:
            told.callback(_show, document)
        told.callback(outputs.deliver, document, as_json=as_json, output=output)
        if report is not None:
            write_report(document, report)
    if (failure := document["not_scored"]) is not None:
        ended = (
            "measuring ended early" if document["interrupted"] else "could not judge the answers"
        )
        raise ValueError(f"{ended} ({failure})")
    if document["interrupted"]:
        raise KeyboardInterrupt


def _tell_of_errors(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        if "error" in row:
            log_stderr(f"not measured: {row['system']} {row['mode']}: {row['error']}")


def _note_idle_flags(modes: Sequence[str], draft_from: Sequence[str], peers: Sequence[str]) -> None:
    note = options.note_without_effect
    drafts = ("draft_tokens", "draft_from")
    of_exits = ["draft_vocabulary", "adaptive"]
    if "early-exit" not in modes:
        of_exits.append("exit_layers")
    if "self-speculative" not in modes:
        note((*drafts, *of_exits), "self-speculative is not among the --modes")
    elif {*draft_from} == {"n-gram"}:
        note(of_exits, "drafts from n-grams have no exit")
    if "llama.cpp" not in peers:
        note(("gguf_weights",), "llama.cpp is not among the --peers")


def _show(document: dict[str, Any]) -> None:
    console = Console(highlight=False)
    narrow = console.width < WIDE
    systems = dict.fromkeys(row["system"] for row in document["rows"] if "error" not in row)
    for system in systems:
        lines = table(document, brief_of=system)
        console.print(
            _table(lines, f"{system}: {document['model']} on {document['task']}", narrow=narrow)
        )
    if len(by_category := categories(document)) > 1:
        console.print(_table(by_category, "speedup (acceptance) by category", narrow=narrow))
    console.print(escape_control_chars("; ".join(conditions(document))), style="dim", markup=False)


def _table(lines: list[list[str]], title: str, *, narrow: bool) -> Table:
    """A table without its heading's words cut; `narrow` breaks lines wherever there is a space."""
    heading, *rest = [
        [escape_control_chars(cell) for cell in line] for line in lines
    ]  # categories are data's
    shown = Table(
        title=escape(escape_control_chars(title)),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(heading):
        words = [word for cell in (name, *(line[i] for line in rest)) for word in cell.split()]
        longest = max(map(len, words), default=0)
        shown.add_column(
            escape(name),
            justify="right" if i else "left",
            min_width=longest,
            max_width=longest if narrow and i else None,
        )
    for line in rest:
        shown.add_row(*map(escape, line))
    return shown
