"""`layerskip demo --train`: messages to JSON, a short training, evaluated before and after."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from layerskip.bench.machine import environment_of
from layerskip.bench.measure import Setting
from layerskip.cli import config_flags
from layerskip.cli.config_flags import ModelConfig
from layerskip.cli.demo_progress import TrainBars
from layerskip.cli.demo_view import Group, cell, compare, group_of, identical, show_legend
from layerskip.cli.output import bash_quoted, escape_control_chars, waiting
from layerskip.data.extraction import EXAMPLE, FIELDS, PROMPT_FORM, extraction_rows
from layerskip.decoding import DecodingConfig, LayerSkipModel
from layerskip.recipe import RecipeConfig
from layerskip.tune.predict import agreement_rate, read_agreement

if TYPE_CHECKING:  # needs the packages of the extra
    from layerskip.training import TrainConfig

ROWS, HELD_OUT, SHOWN = 6000, 60, 3
NEW_TOKENS = 96
LOG_STEPS = 4
EXIT_ALONE = "drafts from early exit"  # label of a row

Row = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All modes on the held-out messages.

    Attributes:
        group: rows of plain decoding, of auto and, with a trained exit, of its drafts alone.
        answers: of plain decoding.
        valid: how many of them are JSON with the fields of the task.
        exact: how many are the right one.
        exit_layer: the exit that is trained.
        agreement: of this exit with the last layer.
    """

    group: Group
    answers: list[str]
    valid: int
    exact: int
    exit_layer: int
    agreement: float | None
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return what the document of `--json` has of it."""
        names = ("valid", "exact", "exit_layer", "agreement")
        return {**self.group, **{name: getattr(self, name) for name in names}}


def train_and_compare(
    config: ModelConfig, minutes: float, folder: Path, console: Console
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
    rows, held_out = extraction_rows(ROWS), extraction_rows(HELD_OUT, held_out=True)
    console.print(
        f"The task: a short message in English or Spanish to one line of JSON. {ROWS} rows to train"
        f" on; {HELD_OUT} others, whose main phrases, names, items and places are in none of these, to"
        " evaluate before and after.",
        soft_wrap=True,
    )
    if config.weights == "stored":  # the result is not quantized: decode both in 16 bits
        config = dataclasses.replace(config, weights="16bit")
    before = evaluate("before training", config, held_out, console)
    try:
        for name, some in {"rows.jsonl": rows, "held-out.jsonl": held_out}.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (folder / name).write_text(lines, encoding="utf-8")
        steps = _train(config, before.exit_layer, minutes, folder, console)
    except BaseException as error:
        # The folder was empty: half a run goes, so that the next one can begin. A result stays, and
        # after a failure checkpoints do, since its message names them.
        is_resumable = any(folder.glob("checkpoint-*")) and not isinstance(error, KeyboardInterrupt)
        if not (is_resumable or any(folder.glob("*.safetensors"))):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    trained = dataclasses.replace(config, model=str(folder))
    after = evaluate("after training", trained, held_out, console)
    console.rule()
    _show_answers(console, held_out, before, after)
    _show_figures(console, before, after)
    name = escape_control_chars(str(folder))
    console.print(
        f"The checkpoint is in {name}:\n  layerskip generate --model {name} --show-draft --stats"
        f" --prompt {bash_quoted(EXAMPLE)}\n"
        "To train on your own rows: docs/how-to/train.md.",
        soft_wrap=True,
        markup=False,
    )
    return {
        "environment": after.environment,
        "model": config.model,
        "folder": str(folder),
        "steps": steps,
        "tasks": [before.to_dict(), after.to_dict()],
    }


def evaluate(name: str, config: ModelConfig, rows: Sequence[Row], console: Console) -> Evaluation:
    """Answer messages in all modes, score the answers, and run the exit over them."""
    model = config_flags.load_model(config)
    prompts = [row["prompt"] for row in rows]
    with waiting("decoding", not console.is_terminal or console.quiet):
        entries, records = compare(
            model,
            name,
            [prompt.rstrip("\n") for prompt in prompts[:SHOWN]],
            prompts,
            _settings(model),
            max_new_tokens=NEW_TOKENS,
            console=console,
        )
    show_legend(console, records)
    answers = [runs[0].text.strip() for runs in entries[0].runs]
    exit_layer = exit_of(len(model.decoder.layers))
    with waiting("running the exit"):
        continuations = [
            read_agreement(
                model.decoder, model.tokenize(prompt), runs[0].token_ids, [exit_layer], NEW_TOKENS
            )
            for prompt, runs in zip(prompts, entries[0].runs, strict=True)
            if len(runs[0].token_ids) > 1
        ]
    pairs = zip(answers, rows, strict=True)
    return Evaluation(
        group=group_of(name, entries),
        answers=answers,
        valid=sum(map(is_valid, answers)),
        exact=sum(answer == row["completion"] for answer, row in pairs),
        exit_layer=exit_layer,
        agreement=agreement_rate(continuations, exit_layer) if continuations else None,
        environment=environment_of(model.decoder),
    )


def _settings(model: LayerSkipModel) -> list[Setting]:
    """Return plain decoding, auto and, with a trained exit, its drafts alone."""
    settings = [
        Setting(config=model.resolve(DecodingConfig(mode="plain"))),
        Setting(config=model.resolve(DecodingConfig(mode="auto")), mode="auto"),
    ]
    if model.settings.exit_layer is not None:
        alone = model.resolve(DecodingConfig(mode="auto", draft_from="early-exit"))
        settings.append(Setting(config=alone, mode="auto", label=EXIT_ALONE))
    return settings


def is_valid(answer: str) -> bool:
    """Return True for a JSON object with the fields of the task."""
    try:
        value = json.loads(answer)
    except (json.JSONDecodeError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == set(FIELDS)


def exit_of(n_layers: int) -> int:
    """Return the exit to train: after about an eighth of the layers.

    Raises:
        ValueError: the model has a single layer.
    """
    if n_layers < 2:
        raise ValueError("this model has a single layer; there is no exit before the last one")
    return max(1, round(n_layers / 8))


def train_config(config: ModelConfig, exit_layer: int, minutes: float, folder: Path) -> TrainConfig:
    """Return the settings, which are those of examples/extraction.yaml."""
    from layerskip.training import TrainConfig

    recipe = RecipeConfig(
        p_max=0.0,
        curriculum="none",
        fixed_exits=(exit_layer,),
        exit_weighting="linear",
        e_scale=5.0,
        distillation_weight=1.0,
    )
    return TrainConfig(
        model=config.model,
        data=str(folder / "rows.jsonl"),
        output=str(folder),
        regime="task",
        recipe=recipe,
        epochs=20,  # the time ends it before, unless it is long
        max_minutes=minutes,
        batch_size=4,
        precision="auto",
        learning_rate=6e-4,
        warmup_steps=10,
        max_length=192,
        log_steps=LOG_STEPS,
        save_steps=1_000_000,  # only the result is kept
        exit_layer=exit_layer,
        draft_tokens=8,
        prompt_form=PROMPT_FORM,
        prompt_example=EXAMPLE,
        device="cpu" if config.device == "cpu" else "auto",
    )


def _train(
    config: ModelConfig, exit_layer: int, minutes: float, folder: Path, console: Console
) -> int:
    """Train the exit; return the steps done."""
    from layerskip.training import train

    with TrainBars(console, minutes) as progress:
        steps = train(train_config(config, exit_layer, minutes, folder), progress).steps
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return steps


def _show_answers(
    console: Console, rows: Sequence[Row], before: Evaluation, after: Evaluation
) -> None:
    """Print some messages with the answers before and after side by side."""
    for row, *answers in list(zip(rows, before.answers, after.answers, strict=True))[:SHOWN]:
        grid = Table.grid(expand=True)
        panels = []
        for title, answer in zip(("before", "after"), answers, strict=True):
            grid.add_column(ratio=1)
            mark = " exact " if answer == row["completion"] else " wrong "
            text = Text(escape_control_chars(answer), overflow="fold")
            panels.append(Panel(text, title=f" {title} ", title_align="left", subtitle=mark))
        grid.add_row(*panels)
        console.print(Text(row["prompt"].rstrip("\n"), "bold"))
        console.print(grid)


def _show_figures(console: Console, before: Evaluation, after: Evaluation) -> None:
    """Print a table with a column before and one after training."""
    n = before.group["samples"]
    table = Table(title=f"{n} held-out messages")
    table.add_column("")
    for heading in ("before", "after"):
        table.add_column(heading, justify="right")
    both = (before, after)
    table.add_row("valid JSON with these fields", *(f"{e.valid} of {n}" for e in both))
    table.add_row("exact match", *(f"{e.exact} of {n}" for e in both))
    rates = (cell(evaluation.agreement, "{:.0%}") for evaluation in both)
    table.add_row(f"exit {after.exit_layer} agrees with the last layer", *rates)
    for i, name in enumerate(("plain", "auto", f"auto, {EXIT_ALONE} only")):
        rows = [evaluation.group["rows"][i : i + 1] for evaluation in both]
        table.add_row(name, *(_speed(*figures) for figures in rows))
    table.add_row("auto identical to plain", *(identical(e.group["rows"][1], n) for e in both))
    for share, answers in (("looping", "loops"), ("echoing", "echoes")):
        counts = [round(n * evaluation.group["rows"][1][share]) for evaluation in both]
        if any(counts):
            name = f"left out of the speedups: {answers}"
            table.add_row(name, *(f"{count} of {n}" for count in counts))
    console.print(table)


def _speed(figures: dict[str, Any] | None = None) -> str:
    """Return tokens/s and, where it is not plain decoding, the speedup without answers that loop."""
    if figures is None:
        return "-"
    speedup = cell(figures["speedup_without_loops"], "{:.2f}x")
    gain = "" if figures["mode"] == "plain" else f" ({speedup})"
    return cell(figures["tokens_per_s"], "{:.0f} tokens/s") + gain
