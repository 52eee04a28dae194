"""`layerskip rm`: remove a model from the cache."""

from pathlib import Path

import click

from layerskip.cli.config_flags import common_options
from layerskip.cli.output import check_outputs, deliver
from layerskip.model.hub import remove


@click.command("rm")
@click.argument("name", metavar="NAME")
@common_options
def command(name: str, as_json: bool, output: Path | None) -> None:
    """Remove a model from the cache; a folder or file elsewhere is never touched.

    NAME is one that layerskip list shows. ORG/NAME removes the whole repository from the cache of the
    Hugging Face hub, which other programs use too, ORG/NAME:Q4_K_M that GGUF file alone.

    \b
    Examples:
      layerskip rm smollm2-135m
      layerskip rm Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:Q4_K_M
    """
    check_outputs({"--output": output})
    freed = remove(name)
    if not as_json:
        click.echo(f"{name}: {freed / 1e6:.1f} MB freed")
    deliver({"name": name, "freed_bytes": freed}, as_json=as_json, output=output)
