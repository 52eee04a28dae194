"""`layerskip demo`: the main job, end to end, on the built-in model or one's own."""

import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from layerskip.bench.environment import environment_of
from layerskip.bench.plots import draw_by_group
from layerskip.cli import options, outputs
from layerskip.cli.demo_figures import bars, group_of, table, title_of, together
from layerskip.cli.demo_tasks import TASKS
from layerskip.cli.demo_view import compare
from layerskip.cli.values import Number
from layerskip.decoding import LayerSkipModel
from layerskip.model.files.writing import replace

HONEST_WORD = (
    "This checkpoint names no exit layer. Early layers that were not trained with layer dropout and"
    " early exit loss rarely agree with the last one, and their drafts would seldom be accepted. Here"
    " auto drafts from n-grams alone: what followed the same tokens earlier in prompt or answer, as far"
    " as that pays. Where a text repeats nothing there is no gain. To teach early layers to answer,"
    " train with the recipe; layerskip demo --train shows the beginning of that."
)
TRY_IT = """
On your own model:
  layerskip train --model MODEL --data ROWS.jsonl --output runs/mine --regime task \\
      --exits 4,8 --exit-layer 4 --curriculum rotational --rotation 2 --p-max 0.05 \\
      --exit-weighting linear --e-scale 1.5 --distillation-weight 1  # 4 and 8 of about 30 layers
  layerskip tune --model runs/mine --data PROMPTS.jsonl
  layerskip demo --model runs/mine"""
MINUTES = 10.0
FOLDER = Path("runs/demo-train")


@click.command("demo")
@options.model_options
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="Of each answer at most. Default: each task's own.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the speeds into a PNG file too; needs matplotlib.",
)
@click.option(
    "--train",
    "trains",
    is_flag=True,
    help="Teach smollm2-135m (or --model) early exits first, on functions of this Python's library.",
)
@click.option(
    "--minutes",
    type=Number(min=0.0, min_open=True),
    help=f"With --train: how long.  [default: {MINUTES:g}]",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help=f"With --train: where the checkpoint goes.  [default: {FOLDER}]",
)
@options.common_options
def command(
    max_new_tokens: int | None,
    picture: Path | None,
    trains: bool,
    minutes: float | None,
    folder: Path | None,
    as_json: bool,
    output: Path | None,
    **flags: Any,
) -> None:
    """Decode three kinds of prompts, plain and in mode auto, side by side.

    Commands are parsed, descriptions summarized, Python functions completed. Both modes take turns on
    every prompt with the same weights; a table and a picture say what came of it. A checkpoint with
    trained exits gets prompts in the form of its training, any other is asked in a chat where it can.

    \b
    Examples:
      layerskip demo
      layerskip demo --model runs/mine --picture demo.png
      layerskip demo --max-new-tokens 128 --output demo.json
      layerskip demo --train --minutes 10
    """
    files = {"--output": output, "--picture": picture}
    outputs.check_outputs(files, beside=(flags["model"],))
    if picture is not None:
        outputs.check_pictures("--picture")
    if not trains and (minutes is not None or folder is not None):
        raise click.UsageError("--minutes and --folder belong to --train")
    console, start = Console(highlight=False, quiet=as_json), time.monotonic()
    if trains:
        from layerskip.cli import demo_train

        if not options.given(("model",)):
            flags["model"] = demo_train.MODEL
        document = demo_train.run(
            flags,
            minutes=minutes or MINUTES,
            folder=folder or FOLDER,
            max_new_tokens=max_new_tokens,
            console=console,
        )
    else:
        document = _decode(flags, max_new_tokens, console)
    console.print(TRY_IT, markup=False, soft_wrap=True)
    document["elapsed_s"] = time.monotonic() - start
    outputs.deliver(document, as_json=as_json, output=output)
    if picture is not None:
        replace(picture, draw_by_group(document["tasks"]))
        console.print(f"Drawn: {picture}", soft_wrap=True, markup=False)


def _decode(flags: dict[str, Any], max_new_tokens: int | None, console: Console) -> dict[str, Any]:
    """The three tasks; the document of `--json`."""
    model = options.load_model(flags)
    with options.waiting("decoding", not console.is_terminal or console.quiet):
        entries = [
            compare(
                model,
                task.name,
                task.texts,
                [task.prompt(text, model) for text in task.texts],
                max_new_tokens=max_new_tokens or task.max_new_tokens,
                console=console,
            )
            for task in TASKS
        ]
    groups = [group_of(task.name, of_task) for task, of_task in zip(TASKS, entries, strict=True)]
    total = group_of("total", together(entries))
    console.rule()
    console.print(table(groups, title_of(flags, model), total))
    console.print(bars(groups))
    console.print(_word(model), soft_wrap=True)
    return {
        "environment": environment_of(model.decoder),
        "model": flags["model"],
        "tasks": groups,
        "total": total["rows"],
    }


def _word(model: LayerSkipModel) -> str:
    """What auto did with this checkpoint."""
    if model.settings.exit_layer is None:
        return HONEST_WORD
    return (
        f"Auto drafted by early exit after {model.settings.exit_layer} of"
        f" {len(model.decoder.layers)} layers, and from n-grams where they match, each as far as it"
        " paid; the remaining layers verified every draft."
    )
