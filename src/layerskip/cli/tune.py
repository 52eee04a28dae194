"""`layerskip tune`: measure, predict, confirm, choose, and write it into the checkpoint."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    config_options,
    model_options,
    note_without_effect,
)
from layerskip.cli.output import (
    bars,
    check_outputs,
    check_report,
    deliver,
    escape_control_chars,
    log_stderr,
    waiting,
)
from layerskip.data.readers import PROMPTS
from layerskip.decoding import LayerSkipModel
from layerskip.fileio import read_json
from layerskip.model.checkpoint import exit_layer_of
from layerskip.tune.tune import (
    MAX_NEW_TOKENS,
    Choice,
    SearchBudget,
    TuneConfig,
    Tuning,
    check_writable,
    name_of_auto,
    search_budget,
    tune,
    write_settings,
)

LONG_S = 60.0  # a longer tuning is announced
_COLUMNS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # draft lengths that a terminal has room for


@click.command("tune")
@model_options
@config_options(TuneConfig)
@click.option(
    "--report",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write pictures to a folder: the map of predictions, and more.",
)
@common_options
def command(report: Path | None, as_json: bool, output: Path | None, **flags: Any) -> None:
    """Find the fastest exit layer and draft length for your prompts on this machine.

    The costs of drafts, verification and plain steps are measured; the model's own answers show which
    drafts would be accepted. From both follows the speed of every pair. The best three are run against
    plain decoding, then mode auto with the best exit and with n-grams alone. The best exit and draft
    length are saved in the checkpoint's generation_config.json, or removed if drafting does not help,
    with the costs and the draft vocabulary of mode auto.

    \b
    Examples:
      layerskip tune --model my-checkpoint --data my-prompts.jsonl
      layerskip tune --model my-checkpoint --data topv2 --report pictures
      layerskip tune --model smollm2-135m --dry-run --output tuning.json
      layerskip tune --model my-checkpoint --data topv2 --grid --exit-layers 2,4,8 --samples 5
    """
    config = config_from_flags(TuneConfig, flags)
    model_config = config_from_flags(ModelConfig, flags)
    name = model_config.model
    check_outputs({"--output": output}, beside=(name, config.data))
    check_report(report)
    folder = Path(name).expanduser()
    writes = folder.is_dir() and not config.dry_run
    if writes:
        check_writable(folder)
    else:
        note_without_effect(("keep_datastore",), "nothing is written into a checkpoint")
    if config.data is not None:
        from layerskip.bench.tasks import check_task

        check_task(config.data, judged=False)
    if not writes and not config.dry_run:
        log_stderr(
            "nothing will be written: settings are kept in a checkpoint folder, and"
            f" {name} is none; the choice is shown as flags"
        )
    model = config_flags.load_model(model_config)
    with waiting("loading the prompts"):
        prompts, stop, longest = _prompts(model, config)
    max_new_tokens = config.max_new_tokens or min(longest, MAX_NEW_TOKENS)
    config = dataclasses.replace(config, max_new_tokens=max_new_tokens)
    with waiting("timing a plain step"):
        budget = search_budget(model, prompts, config)
    _note_budget(budget, is_cut=budget.config.exit_layers != config.exit_layers)
    with bars() as progress:
        tuning = tune(model, prompts, budget.config, stop=stop, progress=progress)
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
                datastore=tuning.datastore if config.keep_datastore else None,
            )
        if report is not None:
            from layerskip.tune.plots import plot_tuning

            pictures = plot_tuning(tuning, report)
    finally:  # keep the measurement, also where it cannot be written or drawn
        result = {
            "model": name,
            "data": config.data,
            **tuning.to_dict(),
            "written_to": None if file is None else str(file),
            "pictures": [str(picture) for picture in pictures],
        }
        try:
            deliver(result, as_json=as_json, output=output)
        finally:
            if not as_json:
                _show(tuning, file, pictures, dry_run=config.dry_run, is_folder=folder.is_dir())


def _note_budget(budget: SearchBudget, *, is_cut: bool) -> None:
    """Note where tuning takes long, or leaves out exits for that reason."""
    if budget.seconds < LONG_S and not is_cut:
        return
    line = (
        f"a plain step takes {1e3 * budget.step_s:.0f} ms here, tuning about"
        f" {budget.seconds:.0f} s; fewer --samples or --max-new-tokens take less"
    )
    if is_cut:
        exits = ", ".join(map(str, budget.config.exit_layers))
        line += f"; only exits {exits} are considered (--exit-layers names others)"
    log_stderr(line)


def _prompts(model: LayerSkipModel, config: TuneConfig) -> tuple[list[Any], tuple[str, ...], int]:
    """Return prompts, stop strings, and the maximum length of answers."""
    chat = model.has_chat_template
    if config.data is None:
        n = min(config.samples, len(PROMPTS))
        texts = random.Random(config.seed).sample(PROMPTS, n)
        prompts = [[{"role": "user", "content": text}] for text in texts] if chat else texts
        return prompts, (), MAX_NEW_TOKENS
    from layerskip.bench.tasks import load_task

    task = load_task(config.data, samples=config.samples, seed=config.seed, chat=chat, judged=False)
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
        line = f"Written to {escape_control_chars(str(file))}; {_effect(choice, file)}."
        console.print(line, soft_wrap=True, markup=False)
    else:
        why = "since settings are kept in a checkpoint folder, and this model is none"
        if is_folder:
            why = "(--dry-run)" if dry_run else "since that failed"
        without = ""
        if choice.mode == "auto":
            without = ", without the costs and the draft vocabulary measured here"
        line = f"Nothing was written {why}. As flags: {choice.flags}{without}"
        console.print(line, soft_wrap=True)
    for picture in pictures:
        console.print(f"Drawn: {escape_control_chars(str(picture))}", soft_wrap=True, markup=False)


def _effect(choice: Choice, file: Path) -> str:
    if choice.mode == "self-speculative":
        return "self-speculative decoding uses it from now on, and mode auto its exit"
    if choice.exit_layer is None and exit_layer_of(read_json(file), file) is not None:
        return "its exit stays for the other machines or weights that it was tuned for"
    if choice.mode == "plain":
        return "mode auto drafts from n-grams alone from now on, as far as they pay"
    return "mode auto uses it from now on"


def _map(tuning: Tuning) -> Table:
    """Return predicted speedups: a row for each exit, a column for each draft length."""
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
        title=f"interleaved runs of {prompts}, greedy",
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
