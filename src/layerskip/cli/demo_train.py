"""`layerskip demo --train`: some minutes of the recipe, and what they change."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from layerskip.bench.environment import environment_of
from layerskip.bench.measure import Entry
from layerskip.cli import demo_functions, options
from layerskip.cli.demo_figures import Group, bars, group_of, table, title_of
from layerskip.cli.demo_functions import Row
from layerskip.cli.demo_view import compare
from layerskip.decoding import LayerSkipModel
from layerskip.recipe import RecipeConfig
from layerskip.training import python_functions
from layerskip.tuning.acceptance import agreement_rate, read_agreement

MODEL = "smollm2-135m"
HELD_OUT = 8
MAX_NEW_TOKENS = 64
LOG_STEPS = 5
HONEST_WORD = (
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
        rows, held_out = demo_functions.split(
            demo_functions.read(python_functions.standard_library()), HELD_OUT
        )
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
    console.print(HONEST_WORD, soft_wrap=True)
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
    from layerskip.training.checks import check_packages
    from layerskip.training.recipe_callback import check_gpus
    from layerskip.training.source import check_files

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
    from layerskip.cli.train_progress import TrainProgress
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
