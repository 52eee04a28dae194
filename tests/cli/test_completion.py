"""Completion of commands and flags in a shell."""

import os
import subprocess
import sys

import click
import pytest
from click.shell_completion import BashComplete

from layerskip.cli import layerskip_command


def completions(line):
    *words, incomplete = line.split(" ")
    complete = BashComplete(layerskip_command, {}, "layerskip", "_LAYERSKIP_COMPLETE")
    return [item.value for item in complete.get_completions(words[1:], incomplete)]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("layerskip tr", ["train"]),
        ("layerskip generate --mode", ["--mode", "--model"]),
        ("layerskip generate --mode pl", ["plain"]),
        ("layerskip train --resume --regime con", ["continual"]),
        ("layerskip train --data a.jsonl --data-", ["--data-config"]),
        ("layerskip train ", [""]),  # files
        ("layerskip pull --he", ["--help"]),
    ],
)
def test_commands_flags_and_choices(line, expected):
    assert sorted(completions(line)) == expected


def test_every_command_has_the_flags_of_its_stand_in():
    quick = click.Context(layerskip_command, resilient_parsing=True)
    real = click.Context(layerskip_command)
    for name in layerskip_command.list_commands(real):
        commands = [layerskip_command.get_command(context, name) for context in (quick, real)]
        flags = [{f for p in c.params for f in (*p.opts, *p.secondary_opts)} for c in commands]
        assert flags[0] == flags[1], name


def test_the_shell_does_not_wait_for_pytorch():
    code = (
        "import sys\n"
        "from layerskip.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    assert 'torch' not in sys.modules, 'PyTorch was imported'\n"
    )
    for instruction, line in (
        ("bash_source", ""),
        ("bash_complete", "layerskip generate --temp"),
    ):
        environment = {
            "_LAYERSKIP_COMPLETE": instruction,
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(line.split()) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert ("plain,--temperature" if line else "_LAYERSKIP_COMPLETE") in done.stdout
