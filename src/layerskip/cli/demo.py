"""`layerskip demo`: the main job, end to end, on the built-in model or one's own."""

import dataclasses
import json
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
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip.bench.machine import environment_of
from layerskip.bench.measure import Entry, Setting, measure
from layerskip.bench.report import OTHER, OWN, draw_by_group
from layerskip.bench.rows import row
from layerskip.bench.systems import LayerSkipSystem, settings_of
from layerskip.cli import config_flags as options
from layerskip.cli import output as outputs
from layerskip.cli.config_flags import Number
from layerskip.cli.output import escape_control_chars
from layerskip.cli.show import DRAFTED_COLOUR
from layerskip.decoding import Answer, LayerSkipModel
from layerskip.decoding.prompt import Prompt
from layerskip.fileio import replace
from layerskip.recipe import RecipeConfig
from layerskip.training import python_functions
from layerskip.training.python_functions import functions_in, python_files
from layerskip.tune.predict import agreement_rate, read_agreement


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoTask:
    """A kind of prompt.

    Attributes:
        name: in tables.
        template: from {text} to the prompt that a model is trained on; no space or line break is left
            at its end that the answer's first token would want to hold.
        question: the same as a question to an assistant; None = there is no such question.
        texts: what is asked.
        max_new_tokens: tokens of an answer at most.
    """

    name: str
    template: str
    question: str | None
    texts: tuple[str, ...]
    max_new_tokens: int

    def prompt(self, text: str, model: LayerSkipModel) -> Prompt:
        """A text as this model is asked.

        A checkpoint with trained exits gets the template, which is how it was trained. Any other gets
        the question, in a chat, where the task has a question and the checkpoint a chat template, else
        the template too.
        """
        is_assistant = model.has_chat_template
        if model.settings.exit_layer is None and self.question is not None and is_assistant:
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


Group = dict[str, Any]  # task, samples, and rows: plain decoding's first


def group_of(name: str, entries: Sequence[Entry]) -> Group:
    """A kind of prompts with the rows of all modes; the first is plain decoding."""
    rows = [row(entry, plain=entries[0].runs) for entry in entries]
    return {"task": name, "samples": len(entries[0].runs), "rows": rows}


def together(groups: Sequence[Sequence[Entry]]) -> list[Entry]:
    """The runs of each mode over all kinds of prompts."""
    return [
        Entry(of_mode[0].system, of_mode[0].setting, [run for e in of_mode for run in e.runs])
        for of_mode in zip(*groups, strict=True)
    ]


def title_of(flags: dict[str, Any], model: LayerSkipModel) -> str:
    """What was measured, in a line."""
    kept = f"{model.decoder.dtype_name}, {flags['weights']}"
    return f"{flags['model']}, {kept}, greedy, one prompt at a time"


def table(groups: Sequence[Group], title: str, total: Group | None = None) -> Table:
    """A line a group, and one for all where it is given: plain decoding, auto, how they compare."""
    shown = Table(title=escape(title))
    headings = ("task", "plain tokens/s", "auto tokens/s", "speedup", "acceptance", "identical")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "task" else "right")
    for group in [*groups, *([total] if total else [])]:
        plain, auto = group["rows"]
        same = round(auto["identical_to_plain"] * group["samples"])
        shown.add_row(
            group["task"],
            _figure(plain["tokens_per_s"], "{:.1f}"),
            _figure(auto["tokens_per_s"], "{:.1f}"),
            _figure(auto["speedup"], "{:.2f}x"),
            _figure(auto["acceptance_rate"], "{:.0%}"),
            f"{same} of {group['samples']}",
            end_section=group is groups[-1],
        )
    return shown


def bars(groups: Sequence[Group]) -> Table:
    """Tokens/s of both modes."""
    fastest = max(r["tokens_per_s"] or 0.0 for group in groups for r in group["rows"])
    shown = Table.grid(padding=(0, 1))
    for group in groups:
        for i, figures in enumerate(group["rows"]):
            speed = figures["tokens_per_s"] or 0.0
            shown.add_row(
                "" if i else group["task"],
                figures["mode"],
                Bar(fastest or 1.0, 0, speed, width=40, color=OWN if i else OTHER),
                _figure(figures["tokens_per_s"], "{:.1f} tokens/s"),
            )
    return shown


def _figure(value: float | None, form: str) -> str:
    """A figure, or a stroke where there is none: no second token, or nothing drafted."""
    return "-" if value is None else form.format(value)


MODES = ("plain", "auto")  # from left to right
REFRESH_S = 0.1


def compare(
    model: LayerSkipModel,
    name: str,
    texts: Sequence[str],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    console: Console,
) -> list[Entry]:
    """Answer all prompts in both modes in turns, and show the answers while they are made.

    Args:
        model: who answers.
        name: of the kind of prompts.
        texts: the prompts as they are shown.
        prompts: as they are asked.
        max_new_tokens: of each answer.
        console: where they are shown.

    Returns:
        What was measured of each of `MODES`.
    """
    with SideBySide(console, name, texts) as view:
        system = LayerSkipSystem(model, settings_of(model, modes=MODES), watch=view.watch)
        return measure(
            [system],
            [model.tokenize(prompt) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            between=view.turn,
        )


@dataclasses.dataclass
class _Column:
    """An answer as far as it has come."""

    mode: str
    text: Text = dataclasses.field(default_factory=Text)
    tokens_per_s: float | None = None
    answered: bool = False

    @property
    def speed(self) -> str:
        """In words; nothing before there is one."""
        return "" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f} tokens/s"

    @property
    def panel(self) -> Panel:
        """The answer in a frame, under its mode and above its speed."""
        title, speed = (f" {part} " if part else "" for part in (self.mode, self.speed))
        return Panel(self.text, title=title, title_align="left", subtitle=speed)


class SideBySide:
    """A context in which answers to some prompts are shown, each prompt's in all modes together.

    Args:
        console: where; on a terminal the columns fill as tokens come.
        name: of the kind of prompts.
        texts: the prompts, in their order.
    """

    def __init__(self, console: Console, name: str, texts: Sequence[str]) -> None:
        self._console, self._name, self._texts = console, name, texts
        self._shows, self._asked = False, 0
        self._columns: list[_Column] = []
        self._live: Live | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def turn(self) -> None:
        """For `between` of `measure`: what comes before the first call is a warm-up and not shown."""
        self._shows = not self._shows

    def watch(self, setting: Setting, answer: Answer) -> None:
        """Compute an answer and show it (`watch` of `LayerSkipSystem`); drawing is not counted."""
        if not self._shows or self._console.quiet:
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
        column.tokens_per_s, column.answered = answer.generation.tokens_per_s, True
        if self._live is not None:
            self._draw(self._live)
        if all(column.answered for column in self._columns):
            self._end()

    def _begin(self) -> None:
        text = self._texts[self._asked]
        self._asked += 1
        self._columns = [_Column(mode) for mode in MODES]
        self._console.rule(f"{self._name}, {self._asked} of {len(self._texts)}", align="left")
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


PROMPT_CHARACTERS = 480
COMPLETION_CHARACTERS = 12, 320  # at least, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A function.

    Attributes:
        file: that it stands in.
        prompt: signature and docstring, without the line break after it.
        completion: the rest, from that line break on.
    """

    file: Path
    prompt: str
    completion: str


def read(folder: Path) -> list[Row]:
    """All functions in a folder's sources that are short and have a docstring; each head once."""
    found: dict[str, Row] = {}
    least, most = COMPLETION_CHARACTERS
    for file in python_files(folder):
        for function in functions_in(file):
            if function.head is None:
                continue
            prompt, completion = function.cut(function.head)
            if len(prompt) <= PROMPT_CHARACTERS and least <= len(completion) <= most:
                found.setdefault(prompt, Row(file=file, prompt=prompt, completion=completion))
    return list(found.values())


def split(rows: list[Row], held_out: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and others from files that nothing is trained on, at most one from each.

    Raises:
        ValueError: there are too few files to hold so many out.
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
    shown = [by_file[file][0] for file in files[:held_out]]
    return [row for file in files[held_out:] for row in by_file[file]], shown


MODEL = "smollm2-135m"
HELD_OUT = 8
MAX_NEW_TOKENS = 64
LOG_STEPS = 5
DEMO_TRAIN_NOTE = (
    "What a few minutes on a CPU can do: early layers that named hardly any of the model's next tokens"
    " begin to name some, most easily the frequent ones of this kind of text. What they cannot: bring"
    " exits near the last layer, which long drafts need, or teach any other kind of text. The training"
    " changed the whole model, so its answers are others than before and, after so few rows, not"
    " better ones; against its own plain decoding they are compared here. A checkpoint for use takes"
    " hours on a CPU, or a GPU, rows of your own task, and layerskip tune at the end."
)


@dataclasses.dataclass(frozen=True)
class _Look:
    """What a checkpoint does on the held-out prompts.

    Attributes:
        group: what was measured of both modes.
        agreement: exit -> share of positions where it names the model's next token; None without any.
        title: of a table.
        environment: the machine and how the checkpoint was run.
    """

    group: Group
    agreement: dict[int, float | None]
    title: str
    environment: dict[str, Any]


def run(
    flags: dict[str, Any],
    *,
    minutes: float,
    folder: Path,
    max_new_tokens: int | None,
    console: Console,
) -> dict[str, Any]:
    """Look at a checkpoint, train it, and look again.

    Args:
        flags: of `options.model_options`; the model that training begins with.
        minutes: of training.
        folder: of the result: an ordinary checkpoint, and the rows as jsonl.
        max_new_tokens: of each answer; None takes `MAX_NEW_TOKENS`.
        console: where all is shown but the progress of training.

    Returns:
        The document of `--json`.

    Raises:
        ImportError: an optional package is missing.
        ValueError: the folder is in use, or the model cannot be trained so.
    """
    _check(flags, folder)
    with options.waiting("reading this Python's library"):
        rows, held_out = split(read(python_functions.standard_library()), HELD_OUT)
    console.print(
        f"{len(rows)} functions of this Python's library to train on; {len(held_out)} others, from"
        " files of their own, to look at before and after.",
        soft_wrap=True,
    )
    length = max_new_tokens or MAX_NEW_TOKENS
    before = _look("before training", flags, held_out, length, console)
    try:
        _write(rows, folder / "rows.jsonl")
        _write(held_out, folder / "held-out.jsonl")
        steps = _train(flags, sorted(before.agreement), minutes, folder)
    except BaseException as error:  # Ctrl-C as well
        # It was empty, and half a run is of no use: the next one can begin. But a result stays that
        # could not be drawn, and a failure names the checkpoints that it leaves.
        started = any(folder.glob("checkpoint-*")) and not isinstance(error, KeyboardInterrupt)
        if not (started or any(folder.glob("*.safetensors"))):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    after = _look("after training", {**flags, "model": str(folder)}, held_out, length, console)
    groups = [before.group, after.group]
    console.rule()
    console.print(_exits_table(before, after))
    console.print(table(groups, after.title))
    console.print(bars(groups))
    console.print(DEMO_TRAIN_NOTE, soft_wrap=True)
    console.print(f"The checkpoint is in {folder}.", soft_wrap=True, markup=False)
    return {
        "environment": after.environment,
        "model": flags["model"],
        "folder": str(folder),
        "steps": steps,
        "exits": [
            {
                "exit_layer": e,
                "agreement_before": before.agreement[e],
                "agreement_after": after.agreement[e],
            }
            for e in sorted(before.agreement)
        ],
        "tasks": groups,
    }


def _check(flags: dict[str, Any], folder: Path) -> None:
    """Refuse what would fail after minutes of work."""
    from layerskip.training.callbacks import check_gpus
    from layerskip.training.loading import check_files
    from layerskip.training.run import check_packages

    check_packages()
    check_files(flags["model"])
    if flags["device"] != "cpu":
        check_gpus(torch.cuda.device_count())
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: choose another --folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)


def _write(rows: Sequence[Row], file: Path) -> None:
    lines = (json.dumps({"prompt": row.prompt, "completion": row.completion}) for row in rows)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _look(
    name: str, flags: dict[str, Any], held_out: Sequence[Row], length: int, console: Console
) -> _Look:
    """Both modes side by side, and how far each exit of the lower half agrees with the last layer."""
    model = options.load_model(flags)
    exits = exits_of(len(model.decoder.layers))
    prompts = [function.prompt for function in held_out]
    entries = compare(model, name, prompts, prompts, max_new_tokens=length, console=console)
    with options.waiting("reading what every exit says"):
        agreement = _agreement(model, prompts, entries[0], exits, length)
    return _Look(
        group_of(name, entries),
        agreement,
        title_of(flags, model),
        environment_of(model.decoder),
    )


def exits_of(n_layers: int) -> list[int]:
    """Few exits of the lower half: an eighth of the layers, a quarter, three eighths, a half.

    Raises:
        ValueError: the model has a single layer.
    """
    if n_layers < 2:
        raise ValueError("this model has a single layer; there is no exit before the last one")
    return sorted({max(1, n_layers * eighths // 8) for eighths in (1, 2, 3, 4)})


def _agreement(
    model: LayerSkipModel, prompts: Sequence[str], plain: Entry, exits: list[int], length: int
) -> dict[int, float | None]:
    found = [
        read_agreement(model.decoder, model.tokenize(prompt), runs[0].token_ids, exits, length)
        for prompt, runs in zip(prompts, plain.runs, strict=True)
        if len(runs[0].token_ids) > 1
    ]
    return {e: agreement_rate(found, e) if found else None for e in exits}


def _train(flags: dict[str, Any], exits: list[int], minutes: float, folder: Path) -> int:
    """Train, the second exit at every step and the others in turn; returns the steps done."""
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
    config = TrainConfig(
        model=flags["model"],
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
        save_steps=1_000_000,  # the result alone is wanted
        device="cpu" if flags["device"] == "cpu" else "auto",  # of one GPU: see `_check`
    )
    with TrainProgress(is_shown=True, figures=_is_shown) as progress:
        steps = train(config, progress).steps
    for checkpoint in folder.glob("checkpoint-*"):  # of this run: the folder was empty before
        shutil.rmtree(checkpoint)
    return steps


def _is_shown(figure: str) -> bool:
    return figure == "loss" or figure.startswith("accuracy_exit_")


def _exits_table(before: _Look, after: _Look) -> Table:
    shown = Table(title="how often an exit names the model's next token")
    for heading in ("layers run", "before", "after"):
        shown.add_column(heading, justify="right")
    for e in before.agreement:
        rates = (look.agreement[e] for look in (before, after))
        shown.add_row(str(e), *("-" if rate is None else f"{rate:.0%}" for rate in rates))
    return shown


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
        if not options.given(("model",)):
            flags["model"] = MODEL
        document = run(
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
