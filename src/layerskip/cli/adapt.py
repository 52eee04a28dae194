"""`layerskip adapt`: train an exit adapter for a frozen model."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from layerskip.adapt import AdaptConfig, adapt
from layerskip.adapt import Progress as Report
from layerskip.adapt.agreement import Agreement
from layerskip.adapt.report import table
from layerskip.cli.config_flags import (
    ModelConfig,
    config_fields,
    config_from_flags,
    config_options,
    debug_option,
    fetch_if_builtin,
    json_option,
    model_options,
    set_threads,
)
from layerskip.cli.output import deliver, escape_control_chars, log_stderr, log_work
from layerskip.training.config import read_settings


class AdaptProgress:
    """A bar of the run's minutes, and a line for each evaluation."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.1f}/{task.total:.0f} min"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("starting", total=None)
        self._loss: float | None = None

    def __enter__(self) -> "AdaptProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, report: Report) -> None:
        """Move the bar, and print a line where the run has been evaluated."""
        self._bar.update(
            self._task,
            description=report.activity,
            completed=min(report.minutes, report.max_minutes),
            total=report.max_minutes,
        )
        self._loss = self._loss if report.loss is None else report.loss
        if report.agreement is not None:
            loss = "" if self._loss is None else f", loss {self._loss:.3f}"
            repeats = report.answers_per_prompt
            repeated = f", {repeats:.1f} answers for each prompt" if repeats > 1 else ""
            self._console.print(
                f"{report.minutes:.1f} of {report.max_minutes:.0f} min: {report.tokens:,} tokens,"
                f" {report.passes:,} passes{repeated}{loss}; {_shares(report.agreement)}"
            )


def _shares(agreement: Agreement) -> str:
    shares = ", ".join(f"{share:.1%}" for share in agreement.by_depth)
    return f"held-out agreement by depth {shares}"


def _with_file(config: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a YAML file, which flags override."""
    if config is None:
        return flags
    fields = config_fields(AdaptConfig) | config_fields(ModelConfig)
    settings = read_settings(config)
    for name in settings:
        if name not in fields:
            raise click.UsageError(f"{config}: there is no setting {name!r}")
    if isinstance(settings.get("data"), str):
        settings["data"] = (settings["data"],)
    return {**flags, **settings, **{n: v for n, v in flags.items() if v not in (None, ())}}


@click.command("adapt")
@click.argument(
    "config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@model_options
@config_options(AdaptConfig)
@json_option
@debug_option
def command(config: Path | None, as_json: bool, **flags: Any) -> None:
    """Train an exit adapter: a small layer that drafts for a model, whose weights stay as they are.

    The answers remain the model's own. CONFIG is a YAML file whose keys are the names of the flags; a
    flag overrides it. Training data are the model's answers to prompts, and texts. The result is
    exit_adapter.safetensors in --output: copy it beside the checkpoint, or name it with --adapter.

    \b
    Examples:
      layerskip adapt --model smollm2-135m --max-minutes 60 --output my-adapter
      layerskip adapt --model my-model --data prompts.jsonl --data python --output my-adapter
      layerskip adapt --model my-model --output my-adapter --resume --max-minutes 300
    """
    flags = _with_file(config, flags)
    settings = config_from_flags(AdaptConfig, flags)
    model = config_from_flags(ModelConfig, flags)
    set_threads(model.threads)
    fetch_if_builtin(model.model)
    with AdaptProgress() as progress:
        try:
            result = adapt(
                model.model,
                settings,
                progress,
                dtype=model.dtype,
                weights=model.weights,
                kv_cache=model.kv_cache,
                device=model.device,
                compile=model.compile,
                announce=log_work,
            )
        except KeyboardInterrupt:
            log_stderr(f"{settings.output} holds the last checkpoint; --resume goes on")
            raise
    document = {
        "adapter": str(result.path),
        "tokens": result.tokens,
        "passes": result.passes,
        "minutes": result.minutes,
        "agreement_by_depth": list(result.agreement.by_depth),
        "speeds": [dataclasses.asdict(speed) for speed in result.speeds],
        "history": result.history,
        "url": result.url,
    }
    if as_json:
        deliver(document, as_json=True, output=None)
    else:
        shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        heading, *rows = table(result.speeds)
        for column in heading:
            shown.add_column(column, justify="left" if column == heading[0] else "right")
        for row in rows:
            shown.add_row(*row)
        Console(highlight=False).print(shown)
        click.echo(f"{escape_control_chars(str(result.path))}: {_shares(result.agreement)}")
        if result.url is not None:
            click.echo(result.url)
