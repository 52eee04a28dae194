"""One edit of `DecodingConfig` adds an option everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTION = """    patience: int = option(7, "Number of rounds to wait.", at_least=1, metavar="N")
    max_new_tokens: int ="""
PROGRAM = """
import json
import click
from layerskip.cli.main import layerskip_command
from reference_pages import config_page
from layerskip.decoding import DecodingConfig

context = click.Context(layerskip_command)
text = ""
for name in ("generate", "chat"):
    command = layerskip_command.get_command(context, name)
    text += command.get_help(click.Context(command, context, name, terminal_width=80))
row = DecodingConfig(patience=9).to_row()
print(json.dumps({"help": text, "table": config_page(), "row": row}))
"""


def test_an_option_is_added_in_one_place(tmp_path):
    package = tmp_path / "layerskip"
    shutil.copytree(ROOT / "src/layerskip", package)  # with __pycache__, which saves compiling
    config = package / "decoding" / "config.py"
    text = config.read_text()
    assert text.count("    max_new_tokens: int =") == 1
    config.write_text(text.replace("    max_new_tokens: int =", OPTION))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'docs'}"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    line = "  --patience N                    Number of rounds to wait.  [default: 7]"
    assert seen["help"].count(line) == 2  # of generate and chat
    assert "| `patience` | `--patience` | `7` | Number of rounds to wait. |\n" in seen["table"]
    assert seen["row"]["patience"] == 9
