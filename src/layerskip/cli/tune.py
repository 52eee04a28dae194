"""`layerskip tune`: measure, predict, confirm, choose, and write it into the checkpoint."""

import random
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerskip.cli import config_flags as options
from layerskip.cli import config_flags as values
from layerskip.cli import output as outputs
from layerskip.cli.output import bars, log_stderr
from layerskip.data.readers import PROMPTS
from layerskip.decoding import LayerSkipModel
from layerskip.fileio import read_json
from layerskip.model.checkpoint import exit_layer_of
from layerskip.tune.tune import (
    MAX_DRAFT_TOKENS,
    Choice,
    Effort,
    Tuning,
    check_writable,
    effort_for,
    name_of_auto,
    tune,
    write_settings,
)

MAX_NEW_TOKENS = 64  # of a task that allows more: enough to see a speed, and soon done
LONG_S = 60.0  # whoever waits longer is told so before
_COLUMNS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # draft lengths that a terminal has room for


@click.command("tune")
@options.model_options
@click.option(
    "--data",
    metavar="TASK|FILE",
    help="Prompts like those you will have: a task of layerskip bench, a .jsonl, or a .txt with a"
    " prompt a paragraph. Default: a few general questions.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=20,
    show_default=True,
    help="Prompts, of those there are.",
)
@click.option(
    "--seed",
    type=int,
    default=1,
    show_default=True,
    help="Which samples are drawn; layerskip bench draws others, unless told so.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help=f"Of each answer. Default: the task's own, at most {MAX_NEW_TOKENS}.",
)
@click.option(
    "--max-draft-tokens",
    type=click.IntRange(1, 64),
    default=MAX_DRAFT_TOKENS,
    show_default=True,
    metavar="d",
    help="Consider drafts of up to so many tokens.",
)
@click.option(
    "--exit-layers",
    "--exit-layer",
    "exit_layers",
    callback=values.layers,
    metavar="4,8,10-12",
    help="Consider these alone, such as 4,8,10-12. Default: all, of a slow model about 8.",
)
@click.option(
    "--grid",
    is_flag=True,
    help="Run every pair for real, not the best three alone. This takes long: keep --samples few.",
)
@click.option(
    "--keep-draft-text",
    is_flag=True,
    help="Write the answers into the checkpoint too, for mode auto to search them for n-grams.",
)
@click.option("--dry-run", is_flag=True, help="Tell, and write nothing into the checkpoint.")
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    help="A folder for pictures: the map of predictions, and more.",
)
@options.common_options
def command(
    data: str | None,
    samples: int,
    seed: int,
    max_new_tokens: int | None,
    max_draft_tokens: int,
    exit_layers: list[int] | None,
    grid: bool,
    keep_draft_text: bool,
    dry_run: bool,
    report: Path | None,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Find the fastest exit layer and draft length for your prompts on this machine.

    What a draft, a verification and a plain step cost is measured here; which drafts would be accepted
    is read from the model's own answers. From both follows the speed of every pair. The best three are
    run for real against plain decoding, then mode auto with the best exit and with n-grams alone. The
    exit of the fastest is written into the checkpoint's generation_config.json with its draft length,
    where mode auto finds the exit, and transformers and --mode self-speculative both; where none is to
    draft, that is what is written. Mode auto gets the costs and the tokens that answers are made of,
    too, and chooses the length of each draft itself.

    \b
    Examples:
      layerskip tune --model my-checkpoint --data my-prompts.jsonl
      layerskip tune --model my-checkpoint --data topv2 --report pictures
      layerskip tune --model smollm2-135m --dry-run --output tuning.json
      layerskip tune --model my-checkpoint --data topv2 --grid --exit-layers 2,4,8 --samples 5
    """
    outputs.check_outputs({"--output": output}, beside=(flags["model"], data))
    outputs.check_report(report)
    folder = Path(flags["model"]).expanduser()
    writes = folder.is_dir() and not dry_run
    if writes:
        check_writable(folder)
    else:
        options.note_without_effect(("keep_draft_text",), "nothing is written into a checkpoint")
    if data is not None:
        from layerskip.bench.tasks import check_task

        check_task(data, judged=False)
    if not writes and not dry_run:
        log_stderr(
            "nothing will be written: settings are kept in a checkpoint folder, and"
            f" {flags['model']} is none; what is chosen is told as flags"
        )
    model = options.load_model(flags)
    with options.waiting("loading the prompts"):
        prompts, stop, longest = _prompts(model, data, samples, seed)
    wanted: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or min(longest, MAX_NEW_TOKENS),
        "max_draft_tokens": max_draft_tokens,
        "grid": grid,
    }
    with options.waiting("trying a plain step"):
        found = effort_for(model, prompts, exits=exit_layers, **wanted)
    _note_effort(found, is_cut=exit_layers is None and found.exits is not None)
    with bars() as progress:
        tuning = tune(
            model,
            prompts,
            exits=found.exits,
            sweeps=found.sweeps,
            stop=stop,
            progress=progress,
            **wanted,
        )
    file, pictures = None, []
    try:
        if writes:
            file = write_settings(
                folder,
                tuning.choice,
                end_tokens=sorted(model.end_tokens),
                record=tuning.record(),
                costs=tuning.step_costs,
                draft_vocabulary=tuning.draft_vocabulary,
                draft_text=tuning.draft_text if keep_draft_text else None,
            )
        if report is not None:
            from layerskip.tune.plots import plot_tuning

            pictures = plot_tuning(tuning, report)
    finally:  # what was measured is told, even where it cannot be written or drawn
        result = {
            "model": flags["model"],
            "data": data,
            **tuning.to_dict(),
            "written_to": None if file is None else str(file),
            "pictures": [str(picture) for picture in pictures],
        }
        try:
            outputs.deliver(result, as_json=as_json, output=output)
        finally:
            if not as_json:
                _show(tuning, file, pictures, dry_run=dry_run, is_folder=folder.is_dir())


def _note_effort(found: Effort, *, is_cut: bool) -> None:
    """A line on stderr where tuning takes long, or leaves something out for that."""
    if found.seconds < LONG_S and not is_cut:
        return
    line = (
        f"a plain step takes {1e3 * found.step_s:.0f} ms here, tuning about"
        f" {found.seconds:.0f} s; fewer --samples or --max-new-tokens take less"
    )
    if is_cut:
        line += (
            f"; exits {', '.join(map(str, found.exits or ()))} alone are considered (--exit-layers"
            " names others)"
        )
    log_stderr(line)


def _prompts(
    model: LayerSkipModel, data: str | None, samples: int, seed: int
) -> tuple[list[Any], tuple[str, ...], int]:
    """Prompts, what stops their answers, and how long these may be."""
    chat = model.has_chat_template
    if data is None:
        texts = random.Random(seed).sample(PROMPTS, min(samples, len(PROMPTS)))
        prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
        return prompts, (), MAX_NEW_TOKENS
    from layerskip.bench.tasks import load_task

    task = load_task(data, samples=samples, seed=seed, chat=chat, judged=False)
    return [sample.prompt for sample in task.samples], task.stop, task.max_new_tokens


def _show(
    tuning: Tuning, file: Path | None, pictures: list[Path], *, dry_run: bool, is_folder: bool
) -> None:
    console = Console(highlight=False)
    console.print(_map(tuning))
    console.print(_confirmed(tuning))
    choice = tuning.choice
    console.print(f"[bold]{choice.reason[0].upper()}{choice.reason[1:]}.[/bold]")
    if file is not None:
        written = f"ExportReport to {file}; {_what_is_used(choice, file)}."
        console.print(written, soft_wrap=True, markup=False)
    else:
        why = "since settings are kept in a checkpoint folder, and this model is none"
        if is_folder:
            why = "(--dry-run)" if dry_run else "since that failed"
        lost = ""
        if choice.mode == "auto":
            lost = ", without the costs and the tokens worth drafting that auto was told of here"
        console.print(f"Nothing was written {why}. As flags: {choice.flags}{lost}", soft_wrap=True)
    for picture in pictures:
        console.print(f"Drawn: {picture}", soft_wrap=True, markup=False)


def _what_is_used(choice: Choice, file: Path) -> str:
    if choice.mode == "self-speculative":
        return "self-speculative decoding uses it from now on, and mode auto its exit"
    if choice.exit_layer is None and exit_layer_of(read_json(file), file) is not None:
        return "its exit stays for the other machines or weights that it was tuned for"
    if choice.mode == "plain":
        return "mode auto drafts from n-grams alone from now on, as far as they pay"
    return "mode auto uses it from now on"


def _map(tuning: Tuning) -> Table:
    """Predicted speedups: an exit a row, a draft length a column, with what the exit is worth."""
    speedups = {(p.exit_layer, p.draft_tokens): p.speedup for p in tuning.predictions}
    lengths = [d for d in _COLUMNS if (tuning.costs.exits[0], d) in speedups]
    best = tuning.predictions[0]
    if best.draft_tokens not in lengths:
        lengths = sorted([*lengths, best.draft_tokens])
    table = Table(
        title="predicted speedup over plain decoding: E down, d across",
        caption=_costs(tuning),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("E", justify="right")
    table.add_column("agrees", justify="right")
    for d in lengths:
        table.add_column(str(d), justify="right")
    for row in tuning.exits:
        cells = [_cell(speedups[row["exit_layer"], d], best.speedup) for d in lengths]
        table.add_row(str(row["exit_layer"]), f"{row['agreement']:.0%}", *cells)
    return table


def _cell(speedup: float, best: float) -> Text:
    style = "bold green" if speedup == best else "green" if speedup > 1.0 else "dim"
    return Text(f"{speedup:.2f}", style=style)


def _costs(tuning: Tuning) -> str:
    costs = tuning.costs
    middle = costs.middle
    x = costs.exits.index(tuning.predictions[0].exit_layer)
    verify = costs.verify_s[middle, x]
    n = len(verify)
    return (
        f"at {costs.contexts[middle]} tokens of context: a plain token"
        f" {1e3 * costs.plain_s[middle]:.1f} ms, the head {1e3 * costs.head_s[middle]:.1f};"
        f" E={costs.exits[x]}: a draft token {1e3 * costs.draft_step_s[middle, x]:.1f} ms,"
        f" verifying 1 position {1e3 * verify[0]:.1f}, {n} positions {1e3 * verify[-1]:.1f}"
    )


def _confirmed(tuning: Tuning) -> Table:
    prompts = f"{tuning.prompts} prompts"
    if tuning.skipped:
        prompts += f" ({tuning.skipped} left out: too long, or without an answer of two tokens)"
    table = Table(
        title=f"real runs of {prompts} in turns, greedy",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    headings = ("mode", "tokens/s", "speedup", "95% interval", "predicted", "accepted", "same")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for row in (*tuning.confirmed, *tuning.auto[1:]):
        plain, auto = row["mode"] == "plain", row["mode"] == "auto"
        low, high = row["speedup_interval"]
        rate = row["acceptance_rate"]
        pair = f"E={row['exit_layer']}, d={row['draft_tokens']}"
        table.add_row(
            "plain" if plain else f"auto, {name_of_auto(row['exit_layer'])}" if auto else pair,
            f"{row['tokens_per_s']:.1f}",
            f"{row['speedup']:.2f}x",
            "" if plain else f"{low:.2f} to {high:.2f}",
            "" if plain or auto else f"{row['predicted_speedup']:.2f}x",
            "" if rate is None else f"{rate:.0%}",
            f"{row['identical_to_plain']:.0%}",
        )
    return table
