"""`layerskip demo --train`: a short training on Python functions, evaluated before and after."""

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from layerskip.bench.machine import environment_of
from layerskip.cli import config_flags
from layerskip.cli.config_flags import ModelConfig
from layerskip.cli.demo_view import Group, compare, group_of, show_groups, title_of
from layerskip.cli.output import escape_control_chars, waiting
from layerskip.recipe import RecipeConfig
from layerskip.training import python_functions
from layerskip.training.python_functions import functions_in, python_files
from layerskip.tune.predict import agreement_rate, read_agreement

HELD_OUT, LOG_STEPS = 8, 5
PROMPT_CHARACTERS = 480
COMPLETION_CHARACTERS = 12, 320  # minimum, maximum
TRAIN_NOTE = (
    "A few minutes on a CPU teach early layers, which predicted hardly any of the model's tokens, to"
    " predict some, most easily frequent ones in this kind of text. They cannot teach exits to agree"
    " closely with the last layer, which long drafts need, or other kinds of text. Training changed the"
    " whole model, so its answers differ from those before and, after so few rows, are not better; they"
    " are compared with its own plain decoding. A checkpoint for use takes hours on a CPU, or a GPU,"
    " rows of your own task, and layerskip tune at the end."
)


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
    title = title_of(config, model)
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
