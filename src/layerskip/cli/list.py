"""`layerskip list`: the models in the cache."""

import datetime
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from layerskip.cli.config_flags import common_options
from layerskip.cli.output import check_outputs, deliver, shown
from layerskip.model.hub import cached


@click.command("list")
@common_options
def command(as_json: bool, output: Path | None) -> None:
    """List the models in the cache: size and last use, the most recently used first.

    These are the built-in models that were fetched, and all models in the cache of the Hugging Face
    hub, those that other programs fetched too.

    \b
    Examples:
      layerskip list
      layerskip list --json
    """
    check_outputs({"--output": output})
    models = sorted(cached(), key=lambda model: -model.last_used)
    if not as_json:
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("model", overflow="fold")
        table.add_column("size", justify="right")
        table.add_column("last used")
        for model in models:
            name = shown(model.name) + ("" if model.is_complete else " (incomplete)")
            table.add_row(name, _size(model.n_bytes), f"{_time(model.last_used):%Y-%m-%d %H:%M}")
        Console().print(
            table if models else "no models are in the cache; layerskip pull fetches one"
        )
    rows = [
        {
            "name": model.name,
            "path": str(model.path),
            "bytes": model.n_bytes,
            "last_used": _time(model.last_used).isoformat(timespec="seconds"),
            "complete": model.is_complete,
        }
        for model in models
    ]
    deliver(rows, as_json=as_json, output=output)


def _time(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(seconds).astimezone()


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
