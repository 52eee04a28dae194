"""The paths through the code that CONTRIBUTING.md describes exist, and are as short as promised."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAX_FILES = {
    "A prompt to an accepted draft": 7,
    "A training batch to the backward pass": 8,
    "A model name to a decoder": 6,
    "A flag of `layerskip bench` to a row of its table": 6,
    "A chat request to its events": 6,
}


def steps_of(title):
    section = TEXT.split(f"**{title}**", 1)[1].split("\n\n", 2)[1]
    return re.findall(r"^\d+\. `([a-z_/]+\.py)`: (.*)$", section, re.MULTILINE)


def names_in(file):
    names = set()
    for node in ast.parse((ROOT / "src" / "layerskip" / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{part.name}"
                for part in node.body
                if isinstance(part, ast.FunctionDef)
            }
    return names


def test_path_through_the_code_exists():
    for title in MAX_FILES:
        steps = steps_of(title)
        files = [file for file, _ in steps]
        assert 1 < len(files) == len(set(files)) <= MAX_FILES[title], "a file is visited once"
        for file, text in steps:
            names = re.findall(r"`([A-Za-z_][A-Za-z_.]*)`", text)
            assert names, text
            assert set(names) & names_in(file), (file, names)
