"""`layerskip demo`: plain decoding and mode auto side by side, and a short training."""

import dataclasses
import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.bar import Bar
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip.bench.machine import environment_of
from layerskip.bench.measure import Entry, Setting, measure
from layerskip.bench.report import OTHER, OWN, draw_by_group
from layerskip.bench.rows import row
from layerskip.bench.systems import LayerSkipSystem, settings_of
from layerskip.cli import config_flags
from layerskip.cli.config_flags import (
    ModelConfig,
    common_options,
    config_from_flags,
    given,
    model_options,
)
from layerskip.cli.output import (
    DRAFTED_COLOUR,
    check_outputs,
    check_pictures,
    deliver,
    escape_control_chars,
    shown,
    waiting,
)
from layerskip.decoding import Answer, LayerSkipModel
from layerskip.decoding.prompt import Prompt
from layerskip.fileio import replace
from layerskip.recipe import RecipeConfig
from layerskip.training import python_functions
from layerskip.training.python_functions import functions_in, python_files
from layerskip.tune.predict import agreement_rate, read_agreement

MODES = ("plain", "auto")  # from left to right
REFRESH_S = 0.1
TRAIN_MODEL, MINUTES, FOLDER = "smollm2-135m", 10.0, Path("runs/demo-train")
HELD_OUT, MAX_NEW_TOKENS, LOG_STEPS = 8, 64, 5
PROMPT_CHARACTERS = 480
COMPLETION_CHARACTERS = 12, 320  # minimum, maximum
UNTRAINED_NOTE = (
    "This checkpoint names no exit layer. Early layers that were not trained with layer dropout and"
    " early exit loss rarely agree with the last one, so their drafts would seldom be accepted. Here"
    " auto drafts from n-grams alone: the continuation of the same tokens earlier in prompt or answer."
    " Text without repetition gains nothing. To train early exits use the recipe; layerskip demo"
    " --train shows the beginning of that."
)
TRAIN_NOTE = (
    "A few minutes on a CPU teach early layers, which predicted hardly any of the model's tokens, to"
    " predict some, most easily frequent ones in this kind of text. They cannot teach exits to agree"
    " closely with the last layer, which long drafts need, or other kinds of text. Training changed the"
    " whole model, so its answers differ from those before and, after so few rows, are not better; they"
    " are compared with its own plain decoding. A checkpoint for use takes hours on a CPU, or a GPU,"
    " rows of your own task, and layerskip tune at the end."
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


Group = dict[str, Any]  # task, samples, and rows, plain decoding's first


def group_of(name: str, entries: Sequence[Entry]) -> Group:
    """Return the rows of all modes on some prompts; the first entry is plain decoding."""
    rows = [row(entry, plain=entries[0].runs) for entry in entries]
    return {"task": name, "samples": len(entries[0].runs), "rows": rows}


def show_groups(
    console: Console, groups: Sequence[Group], title: str, total: Group | None = None
) -> None:
    """Print a table of plain decoding and auto, with a line for each group, and bars of the speeds."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    table = Table(title=shown(title))
    headings = ("task", "plain tokens/s", "auto tokens/s", "speedup", "acceptance", "identical")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "task" else "right")
    for group in [*groups, *([total] if total else [])]:
        plain, auto = group["rows"]
        table.add_row(
            group["task"],
            cell(plain["tokens_per_s"], "{:.1f}"),
            cell(auto["tokens_per_s"], "{:.1f}"),
            cell(auto["speedup"], "{:.2f}x"),
            cell(auto["acceptance_rate"], "{:.0%}"),
            f"{round(auto['identical_to_plain'] * group['samples'])} of {group['samples']}",
            end_section=group is groups[-1],
        )
    fastest = max(r["tokens_per_s"] or 0.0 for group in groups for r in group["rows"])
    bars = Table.grid(padding=(0, 1))
    for group in groups:
        for i, figures in enumerate(group["rows"]):
            speed = figures["tokens_per_s"] or 0.0
            bars.add_row(
                "" if i else group["task"],
                figures["mode"],
                Bar(fastest or 1.0, 0, speed, width=40, color=OWN if i else OTHER),
                cell(figures["tokens_per_s"], "{:.1f} tokens/s"),
            )
    console.print(table)
    console.print(bars)


def compare(
    model: LayerSkipModel,
    name: str,
    texts: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    console: Console,
) -> list[Entry]:
    """Answer prompts in both modes, interleaved, and show the answers while they are made.

    Args:
        model: to run.
        name: of the kind of prompts.
        texts: the prompts as they are shown.
        prompts: the prompts for the model.
        max_new_tokens: of each answer.
        console: to show them on.

    Returns:
        An entry for each of `MODES`.
    """
    with SideBySide(console, name, texts) as view:
        system = LayerSkipSystem(model, settings_of(model, modes=MODES), watch=view.watch)
        ids = [model.tokenize(prompt) for prompt in prompts]
        return measure([system], ids, max_new_tokens=max_new_tokens, between=view.toggle)


@dataclasses.dataclass
class _Column:
    """An answer so far."""

    mode: str
    text: Text = dataclasses.field(default_factory=Text)
    tokens_per_s: float | None = None
    finished: bool = False

    @property
    def speed(self) -> str:
        return "" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tokens/s"

    @property
    def panel(self) -> Panel:
        title, speed = (f" {part} " if part else "" for part in (self.mode, self.speed))
        return Panel(self.text, title=title, title_align="left", subtitle=speed)


class SideBySide:
    """A context that shows the answers to each prompt in all modes together.

    Args:
        console: a terminal, whose columns fill as tokens come, or a file.
        name: of the kind of prompts.
        texts: the prompts, in their order.
    """

    def __init__(self, console: Console, name: str, texts: Sequence[str]) -> None:
        self._console, self._name, self._texts = console, name, texts
        self._is_warm, self._shown = False, 0
        self._columns: list[_Column] = []
        self._live: Live | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def toggle(self) -> None:
        """Start or stop showing (`between` of `measure`): the warm-up is not shown."""
        self._is_warm = not self._is_warm

    def watch(self, setting: Setting, answer: Answer) -> None:
        """Compute an answer and show it (`watch` of `LayerSkipSystem`); drawing is not timed."""
        if not self._is_warm or self._console.quiet:
            return
        if not self._columns:
            self._begin()
        column = self._columns[MODES.index(setting.mode)]
        for piece in answer:
            text = escape_control_chars(piece.text if column.text else piece.text.lstrip("\n"))
            column.text.append(text, DRAFTED_COLOUR if piece.drafted else None)
            if self._live is not None and time.monotonic() - self._drawn_at > REFRESH_S:
                with answer.paused():
                    column.tokens_per_s = answer.generation.tokens_per_s
                    self._draw(self._live)
        column.tokens_per_s, column.finished = answer.generation.tokens_per_s, True
        if self._live is not None:
            self._draw(self._live)
        if all(column.finished for column in self._columns):
            self._end()

    def _begin(self) -> None:
        text = self._texts[self._shown]
        self._shown += 1
        self._columns = [_Column(mode) for mode in MODES]
        self._console.rule(f"{self._name}, {self._shown} of {len(self._texts)}", align="left")
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._console.print(Text(text, "bold"), soft_wrap=not is_live)
        if is_live:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()

    def _draw(self, live: Live) -> None:
        grid = Table.grid(expand=True)
        for _ in self._columns:
            grid.add_column(ratio=1)
        grid.add_row(*(column.panel for column in self._columns))
        live.update(grid, refresh=True)
        self._drawn_at = time.monotonic()

    def _end(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        else:
            for column in self._columns:
                heading = ", ".join(filter(None, (column.mode, column.speed)))
                line = Text.assemble((f"[{heading}] ", "dim"), column.text.plain.strip())
                self._console.print(line, soft_wrap=True)
        self._columns = []


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A Python function: signature with docstring, and the rest from the line break on."""

    file: Path
    prompt: str
    completion: str


def read_functions(folder: Path) -> list[Row]:
    """Return all short functions with a docstring in a folder's sources; each head once."""
    rows: dict[str, Row] = {}
    minimum, maximum = COMPLETION_CHARACTERS
    for file in python_files(folder):
        for function in functions_in(file):
            if function.head is None:
                continue
            prompt, completion = function.cut(function.head)
            if len(prompt) <= PROMPT_CHARACTERS and minimum <= len(completion) <= maximum:
                rows.setdefault(prompt, Row(file=file, prompt=prompt, completion=completion))
    return list(rows.values())


def split(rows: list[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Return rows to train on, and one row from each of some other files.

    Raises:
        ValueError: there are too few files.
    """
    by_file: dict[Path, list[Row]] = {}
    for one in rows:
        by_file.setdefault(one.file, []).append(one)
    files = list(by_file)
    random.Random(0).shuffle(files)
    if len(files) <= held_out:
        raise ValueError(
            f"this Python has library sources with fitting functions in {len(files)} files only, more"
            f" than {held_out} are needed; use a Python that is installed with its sources"
        )
    test = [by_file[file][0] for file in files[:held_out]]
    return [row for file in files[held_out:] for row in by_file[file]], test


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """Both modes on the held-out prompts, and the agreement of each exit with the last layer."""

    group: Group
    agreement: dict[int, float | None]
    title: str
    environment: dict[str, Any]


def train_and_compare(
    config: ModelConfig,
    minutes: float,
    folder: Path,
    max_new_tokens: int,
    console: Console,
) -> dict[str, Any]:
    """Evaluate a checkpoint, train it, and evaluate it again; return the document of `--json`.

    Raises:
        ImportError: an optional package is missing.
        ValueError: the folder is in use, or the model cannot be trained so.
    """
    from layerskip.training.callbacks import check_gpus
    from layerskip.training.loading import check_files
    from layerskip.training.run import check_packages

    check_packages()
    check_files(config.model)
    if config.device != "cpu":
        check_gpus(torch.cuda.device_count())
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another --folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    with waiting("reading this Python's library"):
        rows, held_out = split(read_functions(python_functions.standard_library()), HELD_OUT)
    console.print(
        f"{len(rows)} functions of this Python's library to train on; {len(held_out)} others, from"
        " other files, to evaluate before and after.",
        soft_wrap=True,
    )
    before = _evaluate("before training", config, held_out, max_new_tokens, console)
    exits = sorted(before.agreement)
    try:
        for name, some in {"rows.jsonl": rows, "held-out.jsonl": held_out}.items():
            lines = (json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in some)
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        steps = _train(config, exits, minutes, folder)
    except BaseException as error:
        # The folder was empty: half a run goes, so that the next one can begin. A result stays, and
        # after a failure checkpoints do, since its message names them.
        is_resumable = any(folder.glob("checkpoint-*")) and not isinstance(error, KeyboardInterrupt)
        if not (is_resumable or any(folder.glob("*.safetensors"))):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    trained = dataclasses.replace(config, model=str(folder))
    after = _evaluate("after training", trained, held_out, max_new_tokens, console)
    table = Table(title="how often an exit predicts the model's next token")
    for heading in ("layers run", "before", "after"):
        table.add_column(heading, justify="right")
    for e in exits:
        rates = (evaluation.agreement[e] for evaluation in (before, after))
        table.add_row(str(e), *("-" if rate is None else f"{rate:.0%}" for rate in rates))
    groups = [before.group, after.group]
    console.rule()
    console.print(table)
    show_groups(console, groups, after.title)
    console.print(TRAIN_NOTE, soft_wrap=True)
    where = f"The checkpoint is in {escape_control_chars(str(folder))}."
    console.print(where, soft_wrap=True, markup=False)
    return {
        "environment": after.environment,
        "model": config.model,
        "folder": str(folder),
        "steps": steps,
        "exits": [
            {
                "exit_layer": e,
                "agreement_before": before.agreement[e],
                "agreement_after": after.agreement[e],
            }
            for e in exits
        ],
        "tasks": groups,
    }


def _evaluate(
    name: str, config: ModelConfig, rows: Sequence[Row], max_new_tokens: int, console: Console
) -> _Evaluation:
    model = config_flags.load_model(config)
    exits = exits_of(len(model.decoder.layers))
    prompts = [one.prompt for one in rows]
    entries = compare(model, name, prompts, prompts, max_new_tokens=max_new_tokens, console=console)
    with waiting("running every exit"):
        answers = [
            read_agreement(
                model.decoder, model.tokenize(prompt), runs[0].token_ids, exits, max_new_tokens
            )
            for prompt, runs in zip(prompts, entries[0].runs, strict=True)
            if len(runs[0].token_ids) > 1
        ]
    agreement = {e: agreement_rate(answers, e) if answers else None for e in exits}
    title = _title(config, model)
    return _Evaluation(group_of(name, entries), agreement, title, environment_of(model.decoder))


def exits_of(n_layers: int) -> list[int]:
    """Return few exits of the lower half: after each eighth of the layers.

    Raises:
        ValueError: the model has a single layer.
    """
    if n_layers < 2:
        raise ValueError("this model has a single layer; there is no exit before the last one")
    return sorted({max(1, n_layers * eighths // 8) for eighths in (1, 2, 3, 4)})


def _train(config: ModelConfig, exits: list[int], minutes: float, folder: Path) -> int:
    """Train the second exit at every step and the others in rotation; return the steps done."""
    from layerskip.cli.train import TrainProgress
    from layerskip.training import TrainConfig, train

    fixed = exits[min(1, len(exits) - 1)]
    others = tuple(e for e in exits if e != fixed)
    recipe = RecipeConfig(
        p_max=0.1,
        curriculum="rotational" if others else "none",
        rotation=max(1, len(others)),
        exits=others or None,
        fixed_exits=(fixed,),
        exit_weighting="equal",
        distillation_weight=1.0,
    )
    settings = TrainConfig(
        model=config.model,
        data=str(folder / "rows.jsonl"),
        output=str(folder),
        regime="task",
        recipe=recipe,
        max_minutes=minutes,
        batch_size=8,
        precision="auto",
        learning_rate=3e-4,
        warmup_steps=10,
        max_length=256,
        log_steps=LOG_STEPS,
        save_steps=1_000_000,  # only the result is kept
        device="cpu" if config.device == "cpu" else "auto",
    )
    with TrainProgress(
        is_shown=True, figures=lambda name: name == "loss" or name.startswith("accuracy_exit_")
    ) as progress:
        steps = train(settings, progress).steps
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return steps


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
        new_tokens = max_new_tokens or MAX_NEW_TOKENS
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


def _title(config: ModelConfig, model: LayerSkipModel) -> str:
    precision = f"{model.decoder.dtype_name}, {config.weights}"
    return f"{config.model}, {precision}, greedy, one prompt at a time"


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
    show_groups(console, groups, _title(config, model), total)
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
