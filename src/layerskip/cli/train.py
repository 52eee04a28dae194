"""`layerskip train`: the recipe on a checkpoint; its flags are the settings of `TrainConfig`."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from layerskip.cli.config_flags import (
    config_options,
    debug_option,
    given_flags,
    json_option,
    set_threads,
)
from layerskip.cli.output import deliver, escape_control_chars, log_stderr
from layerskip.recipe import RecipeConfig
from layerskip.training import Progress as Report

# Figures that are only in train_log.jsonl.
_NOT_SHOWN = {
    "skip_rate_mean",
    "skip_rate_last",
    "peak_memory_bytes",
    "total_flos",
    "train_samples_per_second",
    "train_steps_per_second",
}


class _Console(Console):
    """A console on stderr that falls silent when its reader has left; training goes on."""

    def on_broken_pipe(self) -> None:
        """See `Console`, which would end the program."""
        self.quiet = True


class TrainProgress:
    """A context in which the object, called with a run's progress, shows it.

    Args:
        is_shown: False in all processes but one.
        figures: returns True for the names of figures to show; by default the most useful ones, and
            those of single exits in short.
    """

    def __init__(self, *, is_shown: bool, figures: Callable[[str], bool] | None = None) -> None:
        self._shows_exits = figures is None
        self._figures = figures or (lambda name: "_exit_" not in name and name not in _NOT_SHOWN)
        self._console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (is_shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("loading model and data", total=None)

    def __enter__(self) -> "TrainProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, report: Report) -> None:
        """Move the bar, and print a line where there are figures to show."""
        self._bar.update(
            self._task, description="training", completed=report.step, total=report.total_steps
        )
        shown = [f"{k} {v:.4g}" for k, v in report.logs.items() if self._figures(k)]
        shown += _of_exits(report.logs) if self._shows_exits else []
        if shown:
            self._console.print(f"step {report.step}/{report.total_steps}: {', '.join(shown)}")


def _of_exits(logs: Mapping[str, float]) -> list[str]:
    """Loss and token accuracy of each exit: "exit 8 0.31 (91%)", in evaluation "eval exit 8 ..."."""
    parts = []
    for kind in ("", "eval_"):
        loss, accuracy = f"{kind}loss_exit_", f"{kind}accuracy_exit_"
        for e in sorted(int(key.removeprefix(loss)) for key in logs if key.startswith(loss)):
            figures = f"{logs[f'{loss}{e}']:.3g} ({logs[f'{accuracy}{e}']:.0%})"
            parts.append(f"{kind.replace('_', ' ')}exit {e} {figures}")
    return parts


try:
    from layerskip.training import TrainConfig, train
    from layerskip.training.checkpointing import last_good
    from layerskip.training.config import read_settings
    from layerskip.training.run import check_packages
except ImportError as error:
    raise ImportError(
        f"training needs {error.name}; run: pip install 'layerskip[train]'"
    ) from error


def _without_effect(
    flags: Mapping[str, Any], of_file: Mapping[str, Any], recipe: RecipeConfig
) -> list[str]:
    """A line for each setting that the recipe does not look at: of flags, and of the file's own.

    A flag may turn off what the file has settings for, as a control does.
    """
    deciding = ("regime", "variant", "curriculum", "fixed_exits", "p_max", "exit_weighting")
    settings = flags if any(name in flags for name in deciding) else {**of_file, **flags}
    of_dropout = ("dropout_over_layers", "dropout_over_steps", "dropout_every")
    of_curriculum = ("rotation", "exits", "exit_every")
    of_exits = ("exit_weighting", "e_scale", "distillation_weight")
    unused: dict[str, str] = {}
    if recipe.variant == "LD":
        unused |= dict.fromkeys(("curriculum", *of_curriculum, *of_exits), "--variant LD")
    elif recipe.curriculum != "rotational":
        names: tuple[str, ...] = ("rotation",)
        if recipe.curriculum == "none":
            names = of_curriculum if recipe.fixed_exits else (*of_curriculum, *of_exits)
        unused |= dict.fromkeys(names, f"--curriculum {recipe.curriculum}")
    if recipe.variant == "EE":
        unused |= dict.fromkeys(("p_max", *of_dropout), "--variant EE")
    elif recipe.p_max == 0:
        unused |= dict.fromkeys(of_dropout, "--p-max 0")
    if recipe.exit_weighting == "equal":
        unused.setdefault("e_scale", "--exit-weighting equal")
    return [
        f"--{name.replace('_', '-')} has no effect with {cause}"
        for name, cause in unused.items()
        if name in settings
    ]


@click.command("train")
@click.argument(
    "config", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@config_options(TrainConfig)
@json_option
@debug_option
def command(config: Path | None, as_json: bool, **flags: Any) -> None:
    """Train a checkpoint so that its early layers can answer.

    CONFIG is a YAML file whose keys are the names of the flags (with _ or -); a flag overrides it. The
    result in --output is an ordinary transformers checkpoint. The recipe's flags change the preset of
    --regime.

    \b
    Examples:
      layerskip train examples/topv2.yaml --max-minutes 60
      layerskip train --model smollm2-135m --data rows.jsonl --output runs/mine --regime task \\
          --exits 4,8 --exit-layer 4 --curriculum rotational --rotation 2 --p-max 0.05 \\
          --exit-weighting linear --e-scale 1.5 --distillation-weight 1
      layerskip train examples/topv2.yaml --resume
    """
    check_packages()
    given = given_flags(TrainConfig, flags)
    try:
        of_file = read_settings(config) if config else {}
        settings = (
            TrainConfig.from_yaml(config, **given) if config else TrainConfig.from_mapping(given)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if settings.threads is None:  # else `train` sets them
        set_threads()
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun, accelerate launch
    if is_first:
        for line in _without_effect(given, of_file, settings.effective_recipe):
            log_stderr(line)
    with warnings.catch_warnings(), TrainProgress(is_shown=is_first) as progress:
        if not is_first:
            warnings.simplefilter("ignore")
        try:
            result = train(settings, progress)
        except KeyboardInterrupt:
            if is_first:
                log_stderr(f"{last_good(settings.output)}; --resume goes on")
            raise
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort a process that just ends
    if not is_first:
        return
    if as_json:
        document = {
            "output": str(result.output),
            "steps": result.steps,
            "exit_layer": result.exit_layer,
            "metrics": result.metrics,
            "url": result.url,
        }
        deliver(document, as_json=True, output=None)
    else:
        folder = escape_control_chars(str(result.output))
        click.echo(f"{folder}: {result.steps} steps, exit layer {result.exit_layer}")
        if result.url is not None:
            click.echo(result.url)
