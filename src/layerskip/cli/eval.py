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
from rich.table import Table

from layerskip.bench import bench as evaluation
from layerskip.bench.machine import environment_of
from layerskip.bench.perplexity import perplexity, stride_of
from layerskip.bench.report import plot_exits
from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    config_options,
    exit_layers,
    model_options,
    note_without_effect,
)
from layerskip.cli.data import check_finite_file
from layerskip.cli.output import (
    Report,
    bars,
    check_outputs,
    check_pictures,
    deliver,
    run_all,
    shown,
    waiting,
)
from layerskip.data.readers import read_text
from layerskip.decoding import MODES, DecodingConfig, LayerSkipModel
from layerskip.fileio import replace

ARROWS = {True: "↑", False: "↓", None: ""}


def _exits_or_all(
    ctx: click.Context, param: click.Parameter, text: str | None
) -> list[int] | str | None:
    return text if text == "all" else exit_layers(ctx, param, text)


@click.command("eval")
@click.option(
    "--tasks", metavar="A,B", help='Tasks of lm-evaluation-harness; "mmlu_*" is a pattern.'
)
@click.option(
    "--perplexity",
    "texts",
    multiple=True,
    metavar="FILE",
    help="Text file, or wikitext2; repeatable.",
)
@click.option(
    "--exit-layers",
    "--exit-layer",
    "exit_layers",
    metavar="4,8,12-20",
    callback=_exits_or_all,
    help="Exit layers, or all. Default in early-exit: each quarter of the layers.",
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(["auto", *MODES]),
    multiple=True,
    default=("early-exit",),
    show_default=True,
    help="Mode of decoding; repeatable.",
)
@config_options(DecodingConfig, only=("draft_tokens", "draft_from"))
@click.option(
    "--include-path",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Folder of further task files (YAML), which can name local data.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Number of documents of a task."
)
@click.option(
    "--num-fewshot",
    type=click.IntRange(min=0),
    metavar="N",
    help="Number of examples before a question.",
)
@click.option("--apply-chat-template", is_flag=True, help="Wrap prompts in the chat template.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),  # what NumPy takes
    default=1234,
    show_default=True,
    metavar="N",
    help="Seed of examples and sampling.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    metavar="N",
    help="Number of rows in a pass over likelihoods.",
)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    metavar="N",
    help="Tokens of context in tasks. Default: the model's.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    metavar="N",
    help="Tokens of context in perplexity.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens from one window of perplexity to the next. Default: half a window.",
)
@click.option(
    "--max-words", type=click.IntRange(min=1), metavar="N", help="Number of words of each text."
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw every metric over the exits to a file.",
)
@model_options
@common_options
def command(
    tasks: str | None,
    texts: tuple[str, ...],
    exit_layers: list[int] | str | None,
    modes: tuple[str, ...],
    window: int,
    stride: int | None,
    max_words: int | None,
    plot: Path | None,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Evaluate a model at its exits: tasks of lm-evaluation-harness, and perplexity of texts.

    Log-likelihoods of all exits come from one pass. In plain and self-speculative mode they are those
    of the whole model, which verifies every token; only generated answers are decoded in another way.

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
    model_config = config_from_flags(ModelConfig, flags)
    drafting = config_from_flags(DecodingConfig, flags)
    _note_idle_flags(names, texts, modes, drafting.draft_from)
    inputs = (model_config.model, *texts)
    check_outputs({"--output": output, "--plot": plot}, beside=inputs)
    if plot is not None:
        check_pictures("--plot")
    if names and importlib.util.find_spec("lm_eval") is None:
        raise ImportError("--tasks needs lm-evaluation-harness; run: pip install 'layerskip[eval]'")
    with waiting("reading texts"):
        for text in texts:
            check_finite_file(text)
        contents = {text: read_text(text, max_words) for text in texts}
    counts = Counter(Path(text).name for text in contents)
    titles = {text: Path(text).name if counts[Path(text).name] == 1 else text for text in contents}
    model = config_flags.load_model(model_config)
    n_layers = len(model.decoder.layers)
    exits = list(range(1, n_layers + 1)) if isinstance(exit_layers, str) else exit_layers
    rows = evaluation.rows_of(model, modes, exits, drafting.draft_tokens, drafting.draft_from)
    facts: dict[str, Any] = {}
    for name, content in contents.items():  # before the tasks, which may take hours
        if not content:
            raise ValueError(f"{name} is empty: there is nothing to predict")
        stride_of(model, window, stride)
    error: BaseException | None = None
    try:
        with bars() as report:
            if names:  # first, since a wrong name of a task has to be found before any long work
                _add_tasks(model, rows, names, facts, flags, report)
            for name, content in contents.items():
                title = titles[name]
                batch_size = flags["batch_size"]
                _add_perplexity(model, rows, title, content, window, stride, batch_size, report)
    except (KeyboardInterrupt, Exception) as failure:  # the results so far are kept
        if not any(row.results for row in rows):
            raise
        error = failure
    result = {
        "environment": environment_of(
            model.decoder,
            packages=("transformers", "lm-eval") if names else ("transformers",),
        ),
        "model": model_config.model,
        "layers": n_layers,
        "seed": flags["seed"],
        "tasks": facts,
        "interrupted": error is not None,
        "rows": [row.to_dict() for row in rows],
    }
    run_all(
        lambda: None if plot is None else replace(plot, plot_exits(rows, n_layers)),
        lambda: deliver(result, as_json=as_json, output=output),
        lambda: None if as_json else _print_table(rows, model_config.model),
    )
    if error is not None:
        raise error


def _note_idle_flags(
    tasks: Sequence[str], texts: Sequence[str], modes: Sequence[str], draft_from: str | None
) -> None:
    note = note_without_effect
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
    exits = {id(row): row.config.num_layers_to_run(len(model.decoder.layers)) for row in rows}
    metrics = perplexity(
        model,
        text,
        set(exits.values()),
        window=window,
        stride=stride,
        batch_size=batch_size,
        progress=lambda done, total: report(f"perplexity of {name}", done, total),
    )
    for row in rows:
        row.results[name] = metrics[exits[id(row)]]


def _add_tasks(
    model: LayerSkipModel,
    rows: list[evaluation.Row],
    names: list[str],
    facts: dict[str, Any],
    flags: dict[str, Any],
    report: Report,
) -> None:
    report("loading lm-evaluation-harness and its tasks", 0, 1)
    # The harness prints all along; failures are raised.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        from layerskip.bench.harness import evaluate_tasks

        report("loading lm-evaluation-harness and its tasks", 1, 1)
        settings = "include_path limit num_fewshot apply_chat_template seed batch_size max_length"
        chosen = {name: flags[name] for name in settings.split()}
        evaluate_tasks(model, rows, names, facts, **chosen, progress=report)


def _print_table(rows: list[evaluation.Row], model: str) -> None:
    table = Table(title=shown(model))
    for heading in ("task", "metric", "mode", "E", "value", "± stderr"):
        table.add_column(heading, justify="right" if heading in ("E", "value") else "left")
    panels = dict.fromkeys((t, m) for row in rows for t in row.results for m in row.results[t])
    for task, name in panels:
        for i, row in enumerate(row for row in rows if name in row.results.get(task, {})):
            metric = row.results[task][name]
            table.add_row(
                shown(task) if i == 0 else "",  # task files come from others
                f"{shown(name)} {ARROWS[metric.higher_is_better]}" if i == 0 else "",
                row.mode,
                str(row.config.exit_layer or ""),
                f"{metric.value:.4g}",
                "" if metric.stderr is None else f"± {metric.stderr:.2g}",
            )
        table.add_section()
    Console(highlight=False).print(table)
