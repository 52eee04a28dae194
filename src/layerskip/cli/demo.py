"""`layerskip demo`: plain decoding and mode auto side by side on three tasks."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from layerskip.bench.machine import environment_of
from layerskip.bench.measure import Entry
from layerskip.bench.report import draw_by_group
from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    given,
    model_options,
)
from layerskip.cli.demo_train import train_and_compare
from layerskip.cli.demo_view import compare, group_of, show_groups, title_of
from layerskip.cli.output import (
    check_outputs,
    check_pictures,
    deliver,
    escape_control_chars,
    waiting,
)
from layerskip.decoding import LayerSkipModel
from layerskip.decoding.prompt import Prompt
from layerskip.fileio import replace

TRAIN_MODEL, MINUTES, FOLDER = "smollm2-135m", 10.0, Path("runs/demo-train")
TRAIN_NEW_TOKENS = 64
UNTRAINED_NOTE = (
    "This checkpoint names no exit layer. Early layers that were not trained with layer dropout and"
    " early exit loss rarely agree with the last one, so their drafts would seldom be accepted. Here"
    " auto drafts from n-grams alone: the continuation of the same tokens earlier in prompt or answer."
    " Text without repetition gains nothing. To train early exits use the recipe; layerskip demo"
    " --train shows the beginning of that."
)
TRY_IT = """
On your own model:
  layerskip train --model MODEL --data ROWS.jsonl --output runs/mine --regime task \\
      --exits 4,8 --exit-layer 4 --curriculum rotational --rotation 2 --p-max 0.05 \\
      --exit-weighting linear --e-scale 1.5 --distillation-weight 1  # 4 and 8 of about 30 layers
  layerskip tune --model runs/mine --data PROMPTS.jsonl
  layerskip demo --model runs/mine"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoTask:
    """A kind of prompt.

    Attributes:
        name: in tables.
        template: maps {text} to the prompt of a trained checkpoint.
        question: the same as a question to an assistant; None where there is none.
        texts: one for each prompt.
        max_new_tokens: of an answer.
    """

    name: str
    template: str
    question: str | None
    texts: tuple[str, ...]
    max_new_tokens: int

    def prompt(self, text: str, model: LayerSkipModel) -> Prompt:
        """Return a prompt in the form of the checkpoint's training, or for a chat where it can."""
        is_trained = model.settings.exit_layer is not None
        if not is_trained and self.question is not None and model.has_chat_template:
            return [{"role": "user", "content": self.question.format(text=text)}]
        return self.template.format(text=text)


TASKS = (
    DemoTask(
        name="parse",
        template="{text}\n",
        question=None,
        texts=(
            "Wake me at twenty past six on every workday",
            "How cold will it get in Oslo on Sunday night",
            "Text Mira that my train is ten minutes late",
            "Remind me to water the plants when I am home on Friday",
        ),
        max_new_tokens=64,
    ),
    DemoTask(
        name="summarize",
        template="{text}\n\nSummary:",
        question="Say in one line what this package does:\n\n{text}",
        texts=(
            "Tidemark reads the tables that ports publish and works out high and low water for"
            " any day. It knows about four hundred harbours. Results come as text, as JSON or as"
            " a calendar file, and no network is needed once the tables are there.",
            "Pocketlog writes one line for each event into a file that never grows beyond the"
            " size you choose. Old lines give way to new ones. It has no dependencies and is safe"
            " to use from several threads.",
            "Grainsort puts photographs into folders by the day and place they were taken. It"
            " reads what the camera stored and never changes a picture. Where the place is"
            " missing, it takes that of the picture before.",
            "Quillcheck looks through Markdown files for links that lead nowhere. It follows"
            " links between files and to headings, and on request those to web pages. In a build"
            " it fails with a list of what is wrong.",
        ),
        max_new_tokens=48,
    ),
    DemoTask(
        name="code",
        template="{text}",
        question="Complete this Python function:\n\n```python\n{text}\n```",
        texts=(
            'def count_words(text):\n    """Return a dict from each word of text to how often it'
            ' occurs.\n\n    Words are compared in lower case.\n    """',
            'def is_leap_year(year):\n    """Return True if year has 366 days in the Gregorian'
            ' calendar."""',
            'def chunks(items, size):\n    """Split a list into lists of size items each; the last'
            ' one may be shorter."""',
            'def read_settings(path):\n    """Read lines of the form name = value into a dict.\n\n'
            '    Empty lines and lines that begin with # are left out.\n    """',
        ),
        max_new_tokens=96,
    ),
)


@click.command("demo")
@model_options
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="Maximum number of new tokens. Default: the task's.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Draw the speeds to a PNG file; needs matplotlib.",
)
@click.option(
    "--train",
    "trains",
    is_flag=True,
    help="Train early exits of smollm2-135m (or --model) first, on functions of this Python's library.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.0, min_open=True),
    metavar="X",
    help=f"Duration of --train.  [default: {MINUTES:g}]",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help=f"Folder of the checkpoint of --train.  [default: {FOLDER}]",
)
@common_options
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

    Commands are parsed, descriptions summarized, Python functions completed. Both modes alternate on
    every prompt with the same weights; a table and bars show the result. A checkpoint with trained
    exits gets prompts in the form of its training, any other is asked in a chat where it can.

    \b
    Examples:
      layerskip demo
      layerskip demo --model runs/mine --picture demo.png
      layerskip demo --max-new-tokens 128 --output demo.json
      layerskip demo --train --minutes 10
    """
    config = config_from_flags(ModelConfig, flags)
    check_outputs({"--output": output, "--picture": picture}, beside=(config.model,))
    if picture is not None:
        check_pictures("--picture")
    if not trains and (minutes is not None or folder is not None):
        raise click.UsageError("--minutes and --folder belong to --train")
    if minutes is not None and not math.isfinite(minutes):
        raise click.UsageError(f"--minutes is {minutes}, it has to be finite")
    console, start = Console(highlight=False, quiet=as_json), time.monotonic()
    if trains:
        if not given(("model",)):
            config = dataclasses.replace(config, model=TRAIN_MODEL)
        new_tokens = max_new_tokens or TRAIN_NEW_TOKENS
        folder = folder or FOLDER
        document = train_and_compare(config, minutes or MINUTES, folder, new_tokens, console)
    else:
        document = _decode(config, max_new_tokens, console)
    console.print(TRY_IT, markup=False, soft_wrap=True)
    document["elapsed_s"] = time.monotonic() - start
    deliver(document, as_json=as_json, output=output)
    if picture is not None:
        replace(picture, draw_by_group(document["tasks"]))
        console.print(f"Drawn: {escape_control_chars(str(picture))}", soft_wrap=True, markup=False)


def _decode(config: ModelConfig, max_new_tokens: int | None, console: Console) -> dict[str, Any]:
    """Run the three tasks; return the document of `--json`."""
    model = config_flags.load_model(config)
    with waiting("decoding", not console.is_terminal or console.quiet):
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
    all_entries = [
        Entry(modes[0].system, modes[0].setting, [runs for entry in modes for runs in entry.runs])
        for modes in zip(*entries, strict=True)
    ]
    total = group_of("total", all_entries)
    console.rule()
    show_groups(console, groups, title_of(config, model), total)
    exit_layer = model.settings.exit_layer
    note = (
        UNTRAINED_NOTE
        if exit_layer is None
        else (
            f"Auto drafted by early exit after {exit_layer} of {len(model.decoder.layers)} layers, and"
            " from n-grams where they match; the remaining layers verified every draft."
        )
    )
    console.print(note, soft_wrap=True)
    return {
        "environment": environment_of(model.decoder),
        "model": config.model,
        "tasks": groups,
        "total": total["rows"],
    }
