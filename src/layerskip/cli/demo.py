"""`layerskip demo`: plain decoding and mode auto side by side in three scenes."""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from layerskip.bench.machine import environment_of
from layerskip.bench.measure import Setting
from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    given,
    model_options,
)
from layerskip.cli.demo_svg import Panel, animation
from layerskip.cli.demo_train import train_and_compare
from layerskip.cli.demo_view import Group, Record, compare, group_of, show_groups, show_legend
from layerskip.cli.output import check_outputs, deliver, escape_control_chars, waiting
from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.decoding.prompt import Prompt
from layerskip.fileio import replace
from layerskip.model.hub import DEFAULT_MODEL, TRAINED_MODEL

MINUTES, FOLDER = 10.0, Path("runs/demo-train")
TRY_IT = """
On your own model:
  layerskip bench --model MODEL --task PROMPTS.jsonl --modes auto  # is it faster on your prompts?
  layerskip demo --train                                           # teach a model to exit early"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A kind of prompt and the model that answers it.

    Attributes:
        name: in tables.
        title: one line about model and prompts.
        model: the built-in name.
        template: maps {text} to the prompt.
        is_chat: the prompt is a message of a conversation.
        texts: one for each prompt.
        max_new_tokens: of an answer.
        note: one line about the result.
        prediction: a text that the answers are predicted to be.
        stop: texts that end an answer.
    """

    name: str
    title: str
    model: str
    template: str
    is_chat: bool
    texts: tuple[str, ...]
    max_new_tokens: int
    note: str
    prediction: str | None = None
    stop: tuple[str, ...] = ()

    def prompt(self, text: str) -> Prompt:
        """Return the prompt for the model."""
        prompt = self.template.format(text=text)
        return [{"role": "user", "content": prompt}] if self.is_chat else prompt

    def settings(self, model: LayerSkipModel) -> list[Setting]:
        """Return plain decoding and auto."""
        plain = DecodingConfig(mode="plain", stop=self.stop)
        auto = DecodingConfig(mode="auto", stop=self.stop, prediction=self.prediction)
        return [
            Setting(config=model.resolve(plain)),
            Setting(config=model.resolve(auto), mode="auto"),
        ]


FILE = """\
```toml
[server]
host = "127.0.0.1"
port = 8080
workers = 4
timeout = 30

[database]
name = "tidemark"
user = "reader"
pool = 10

[log]
level = "info"
file = "/var/log/tidemark.log"
keep_days = 14
```"""

SCENES = (
    Scene(
        name="commands",
        title="Commands to a model with trained early exits",
        model=TRAINED_MODEL,
        template="{text}\n",
        is_chat=False,
        texts=(
            "Wake me at twenty past six every weekday",
            "How cold will it get in Oslo on Sunday night",
            "Text Mira that my train is ten minutes late",
            "Remind me to water the plants when I am home on Friday",
        ),
        max_new_tokens=64,
        note="its first layers draft, all layers verify",
    ),
    Scene(
        name="edit",
        title="An edit by a model as it was downloaded",
        model=DEFAULT_MODEL,
        template=FILE + "\n\n{text}",
        is_chat=True,
        texts=("Write this file again with port = 9090.",),
        max_new_tokens=160,
        note="the file itself is the draft; no training, any model",
        prediction=FILE,
        stop=("\n```",),
    ),
    Scene(
        name="question",
        title="A free question",
        model=DEFAULT_MODEL,
        template="{text}",
        is_chat=True,
        texts=(
            "Why is the sky blue? Answer in two sentences.",
            "Write a Python function that reverses a string.",
        ),
        max_new_tokens=96,
        note="little to copy; an exit adapter drafts, if the model has one",
    ),
)


@click.command("demo")
@model_options
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    help="Maximum number of new tokens. Default: the scene's.",
)
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.svg",
    help="Draw the answers as they came to an animated SVG file.",
)
@click.option(
    "--train",
    "trains",
    is_flag=True,
    help="Train early exits of smollm2-135m (or --model) on a task first: short messages to JSON.",
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

    Commands go to a checkpoint with trained early exits; an edit and a free question to a model as it
    was downloaded (or to --model, which answers all three if it is given). Both modes alternate on every
    prompt with the same weights; a table shows the result.

    \b
    Examples:
      layerskip demo
      layerskip demo --picture demo.svg
      layerskip demo --max-new-tokens 128 --output demo.json
      layerskip demo --train --minutes 10
    """
    config = config_from_flags(ModelConfig, flags)
    check_outputs({"--output": output, "--picture": picture}, beside=(config.model,))
    if trains and picture is not None:
        raise click.UsageError("--picture shows the scenes, which --train does not have")
    if not trains and (minutes is not None or folder is not None):
        raise click.UsageError("--minutes and --folder belong to --train")
    if minutes is not None and not math.isfinite(minutes):
        raise click.UsageError(f"--minutes is {minutes}, it has to be finite")
    console, start = Console(highlight=False, quiet=as_json), time.monotonic()
    if trains:
        document = train_and_compare(config, minutes or MINUTES, folder or FOLDER, console)
    else:
        document, panels = _play(config, max_new_tokens, console)
        if picture is not None:
            replace(picture, animation(panels).encode())
            where = escape_control_chars(str(picture))
            console.print(f"Drawn: {where}", soft_wrap=True, markup=False)
        console.print(TRY_IT, markup=False, soft_wrap=True)
    document["elapsed_s"] = time.monotonic() - start
    deliver(document, as_json=as_json, output=output)


def _play(
    config: ModelConfig, max_new_tokens: int | None, console: Console
) -> tuple[dict[str, Any], list[Panel]]:
    """Run the scenes; return the document of `--json`, and what the picture shows."""
    groups: list[Group] = []
    panels: list[Panel] = []
    records: list[Record] = []
    loaded = ""
    for scene in SCENES:
        name = config.model if given(("model",)) else scene.model
        if name != loaded:
            model = config_flags.load_model(dataclasses.replace(config, model=name))
            loaded = name
        console.print(f"\n{scene.title} ({escape_control_chars(name)})", style="bold", markup=False)
        with waiting("decoding", not console.is_terminal or console.quiet):
            entries, recorded = compare(
                model,
                scene.name,
                scene.texts,
                [scene.prompt(text) for text in scene.texts],
                scene.settings(model),
                max_new_tokens=max_new_tokens or scene.max_new_tokens,
                console=console,
            )
        group = group_of(scene.name, entries)
        groups.append({**group, "model": name})
        panels.append(Panel(scene.title, recorded[0]))
        records += recorded
    console.rule()
    show_legend(console, records)
    title = f"{model.decoder.dtype_name}, --weights {config.weights}, greedy, one prompt at a time"
    show_groups(console, groups, title)
    for scene, group in zip(SCENES, groups, strict=True):
        speedup = group["rows"][1]["speedup"]
        gain = "" if speedup is None else f" {speedup:.2f}x,"
        console.print(f"{scene.name}:{gain} {scene.note}", soft_wrap=True)
    return {"environment": environment_of(model.decoder), "scenes": groups}, panels
