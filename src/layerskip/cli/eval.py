"""`layerskip eval`: lm-evaluation-harness and perplexity at every exit."""

import contextlib
import importlib.util
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from layerskip.bench import bench as evaluation
from layerskip.bench.machine import environment_of
from layerskip.bench.perplexity import perplexity, stride_of
from layerskip.bench.report import plot_exits
from layerskip.cli import config_flags as options
from layerskip.cli import config_flags as values
from layerskip.cli import output as outputs
from layerskip.cli.output import Report, bars, escape_control_chars
from layerskip.data.readers import read_text
from layerskip.decoding import MODES, LayerSkipModel
from layerskip.decoding.policy import DRAFT_SOURCES
from layerskip.fileio import replace

ARROWS = {True: "↑", False: "↓", None: ""}


def _exit_layers(
    ctx: click.Context, param: click.Parameter, text: str | None
) -> list[int] | str | None:
    return text if text == "all" else values.layers(ctx, param, text)


@click.command("eval")
@click.option(
    "--tasks", metavar="A,B", help='Tasks of lm-evaluation-harness; "mmlu_*" is a pattern.'
)
@click.option(
    "--perplexity",
    "texts",
    multiple=True,
    metavar="FILE",
    help="A text file, or wikitext2; may be repeated.",
)
@click.option(
    "--exit-layers",
    "--exit-layer",
    "exit_layers",
    metavar="4,8,12-20",
    callback=_exit_layers,
    help="Exit layers, or all. Default of early-exit: the quarters of the layers.",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["auto", *MODES]),
    multiple=True,
    default=("early-exit",),
    show_default=True,
    help="How answers are decoded; may be repeated.",
)
@click.option("--draft-tokens", type=click.IntRange(min=0), metavar="d", help="Tokens a draft.")
@click.option("--draft-from", type=click.Choice(DRAFT_SOURCES), help="Where drafts come from.")
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of further task files (YAML); they can name local data.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Documents a task.")
@click.option(
    "--num-fewshot", type=click.IntRange(min=0), metavar="N", help="Examples before a question."
)
@click.option("--apply-chat-template", is_flag=True, help="Wrap prompts in the chat template.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),  # what NumPy takes
    default=1234,
    show_default=True,
    help="Of examples and sampling.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Rows a pass where likelihoods are computed.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of context in tasks. Default: what the model has.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Tokens of context in perplexity.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    help="Tokens from one window of perplexity to the next. Default: half a window.",
)
@click.option(
    "--max-words", type=click.IntRange(min=1), metavar="N", help="Words of each text that count."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw every metric over the exits.",
)
@options.model_options
@options.common_options
def command(
    tasks: str | None,
    texts: tuple[str, ...],
    exit_layers: list[int] | str | None,
    modes: tuple[str, ...],
    draft_tokens: int | None,
    draft_from: str | None,
    window: int,
    stride: int | None,
    max_words: int | None,
    plot: Path | None,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Judge a model at its exits: tasks of lm-evaluation-harness, and perplexity of texts.

    Log-likelihoods of all exits come from one pass. In plain and self-speculative mode they are
    those of the whole model, since it has the last word; only generated answers take another way.

    \b
    Examples:
      layerskip eval --tasks arc_easy,hellaswag --limit 200 --exit-layers 8,15,30
      layerskip eval --tasks gsm8k --mode plain --mode self-speculative --exit-layers 8
      layerskip eval --tasks my_task --include-path my_tasks --output results.json
      layerskip eval --perplexity wikitext2 --exit-layers all --plot exits.png
    """
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if not names and not texts:
        raise click.UsageError("give --tasks or --perplexity")
    if texts and stride is not None and stride > window:
        raise click.UsageError(f"--stride {stride} is more than the --window of {window} tokens")
    _note_idle_flags(names, texts, modes, draft_from)
    outputs.check_outputs({"--output": output, "--plot": plot}, beside=(flags["model"], *texts))
    if plot is not None:
        outputs.check_pictures("--plot")
    if names and importlib.util.find_spec("lm_eval") is None:
        raise ImportError("--tasks needs lm-evaluation-harness; run: pip install 'layerskip[eval]'")
    with options.waiting("reading what perplexity is asked of"):
        contents = {text: read_text(text, max_words) for text in texts}
    short = Counter(Path(text).name for text in contents)
    called = {text: Path(text).name if short[Path(text).name] == 1 else text for text in contents}
    model = options.load_model(flags)
    n_layers = len(model.decoder.layers)
    exits = list(range(1, n_layers + 1)) if isinstance(exit_layers, str) else exit_layers
    rows = evaluation.rows_of(model, modes, exits, draft_tokens, draft_from)
    facts: dict[str, Any] = {}
    for name, content in contents.items():  # before the tasks, which may take hours
        if not content:
            raise ValueError(f"{name} is empty: there is nothing to predict")
        stride_of(model, window, stride)
    ended: BaseException | None = None
    try:
        with bars() as report:
            if names:  # first, since a wrong name of a task is to be found before any long work
                _add_tasks(model, rows, names, facts, flags, report)
            for name, content in contents.items():
                _add_perplexity(
                    model, rows, called[name], content, window, stride, flags["batch_size"], report
                )
    except (KeyboardInterrupt, Exception) as error:  # what there is, is told
        if not any(row.results for row in rows):
            raise
        ended = error
    result = {
        "environment": environment_of(
            model.decoder,
            packages=("transformers", "lm-eval") if names else ("transformers",),
        ),
        "model": flags["model"],
        "layers": n_layers,
        "seed": flags["seed"],
        "tasks": facts,
        "interrupted": ended is not None,
        "rows": [row.to_dict() for row in rows],
    }
    with contextlib.ExitStack() as told:  # backwards, and each where another cannot be written
        if not as_json:
            told.callback(_print_table, rows, flags["model"])
        told.callback(outputs.deliver, result, as_json=as_json, output=output)
        if plot is not None:
            replace(plot, plot_exits(rows, n_layers))
    if ended is not None:
        raise ended


def _note_idle_flags(
    tasks: Sequence[str], texts: Sequence[str], modes: Sequence[str], draft_from: str | None
) -> None:
    note = options.note_without_effect
    if not tasks:
        idle = "include_path limit num_fewshot apply_chat_template max_length seed"
        note(idle.split(), "there are no --tasks")
    if not texts:
        note(("window", "stride", "max_words"), "there is no --perplexity")
    if not {*modes} & {*evaluation.DRAFTING}:
        note(("draft_tokens", "draft_from"), "no --mode here drafts")
    if {*modes} == {"plain"}:
        note(("exit_layers",), "plain decoding runs all layers")
    elif draft_from == "n-gram" and "early-exit" not in modes:
        note(("exit_layers",), "drafts from n-grams have no exit")


def _add_perplexity(
    model: LayerSkipModel,
    rows: list[evaluation.Row],
    name: str,
    text: str,
    window: int,
    stride: int | None,
    batch_size: int,
    report: Report,
) -> None:
    exits = {id(row): row.plan.final_exit(len(model.decoder.layers)) for row in rows}
    found = perplexity(
        model,
        text,
        set(exits.values()),
        window=window,
        stride=stride,
        batch_size=batch_size,
        progress=lambda done, total: report(f"perplexity of {name}", done, total),
    )
    for row in rows:
        row.results[name] = found[exits[id(row)]]


def _add_tasks(
    model: LayerSkipModel,
    rows: list[evaluation.Row],
    names: list[str],
    facts: dict[str, Any],
    flags: dict[str, Any],
    report: Report,
) -> None:
    report("loading lm-evaluation-harness and its tasks", 0, 1)
    # It prints and logs all along; what goes wrong is raised.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from layerskip.bench.harness import evaluate_tasks

        report("loading lm-evaluation-harness and its tasks", 1, 1)
        settings = "include_path limit num_fewshot apply_chat_template seed batch_size max_length"
        chosen = {name: flags[name] for name in settings.split()}
        evaluate_tasks(model, rows, names, facts, **chosen, progress=report)


def _print_table(rows: list[evaluation.Row], model: str) -> None:
    table = Table(title=escape(escape_control_chars(model)))
    for heading in ("task", "metric", "mode", "E", "value", "± stderr"):
        table.add_column(heading, justify="right" if heading in ("E", "value") else "left")
    panels = dict.fromkeys((t, m) for row in rows for t in row.results for m in row.results[t])
    for task, name in panels:
        for i, row in enumerate(row for row in rows if name in row.results.get(task, {})):
            metric = row.results[task][name]

            def shown(word: str) -> str:  # task files come from others
                return escape(escape_control_chars(word))

            table.add_row(
                shown(task) if i == 0 else "",
                f"{shown(name)} {ARROWS[metric.higher_is_better]}" if i == 0 else "",
                row.mode,
                str(row.plan.exit_layer or ""),
                f"{metric.value:.4g}",
                "" if metric.stderr is None else f"± {metric.stderr:.2g}",
            )
        table.add_section()
    Console(highlight=False).print(table)
