"""Shell completion without PyTorch, from a table of all flags.

A command's module takes seconds to import, too long for the Tab key. `docs/reference_pages.py` writes
the table, flags.json: command -> flag or argument -> "flag", "file", "value" or a list of choices.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import click

FLAGS_FILE = Path(__file__).with_name("flags.json")
_FILES = ("text", "path", "filename", "file", "directory")  # names of types in click


def flags_table(commands: Iterable[click.Command]) -> str:
    """Return the table of some commands as JSON."""
    table = {}
    for command in commands:
        flags: dict[str, str | list[str]] = {}
        for parameter in command.params:
            names = (*parameter.opts, *parameter.secondary_opts)
            flags |= dict.fromkeys(names, _kind(parameter))
        table[command.name] = flags
    return json.dumps(table, indent=1) + "\n"


def _kind(parameter: click.Parameter) -> str | list[str]:
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "flag"
    if isinstance(parameter.type, click.Choice):
        return [str(choice) for choice in parameter.type.choices]
    return "file" if parameter.type.name in _FILES else "value"


def stand_in(name: str, summary: str) -> click.Command:
    """Return a command with the flags of the real one, which does nothing."""
    flags = json.loads(FLAGS_FILE.read_text(encoding="utf-8"))[name]
    parameters = [_parameter(flag, kind) for flag, kind in flags.items()]
    return click.Command(name, help=summary, params=parameters)


def _parameter(flag: str, kind: str | list[str]) -> click.Parameter:
    kinds = {"file": click.Path(), "value": click.STRING, "flag": click.BOOL}
    type_ = kinds[kind] if isinstance(kind, str) else click.Choice(kind)
    if not flag.startswith("-"):
        return click.Argument([flag], type=type_, required=False)
    return click.Option([flag], is_flag=kind == "flag", type=type_, multiple=kind != "flag")
