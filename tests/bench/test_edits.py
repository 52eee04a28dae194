"""Task `edits`: changes of standard library files, the same for one version of Python."""

import ast
import random

import pytest

from layerskip.bench import edits
from layerskip.bench.edits import EDITS, LINES, N_EDITS, EditRows, code_of, fenced
from layerskip.bench.quality import Sample
from layerskip.bench.tasks import load_task


@pytest.fixture(scope="module")
def rows():
    return EditRows().rows("test")


def score(row, text):
    return edits.metrics([Sample(id="", prompt="", fields=row)], [text])


def row_of(kind, file, seed=0):
    edit = next(EDITS[kind](file, random.Random(seed)))
    return {"kind": kind, "file": file, "instruction": edit.instruction, "expected": edit.expected}


def test_the_rows_are_edits_of_different_files_of_every_kind(rows):
    assert rows == EditRows().rows("test")
    assert len(rows) == N_EDITS
    assert {row["kind"] for row in rows} == set(EDITS)
    assert len({row["module"] for row in rows}) == N_EDITS
    for row in rows:
        assert row["file"].count("\n") in LINES
        ast.parse(row["expected"])
        assert (row["expected"] != row["file"]) == (row["kind"] != "type hints")


def test_right_answers_are_right_and_other_ones_are_not(rows):
    for row in rows:
        unchanged = score(row, fenced(row["file"]))
        assert (unchanged["parses"], unchanged["correct"], unchanged["kept"]) == (1, 0, 1)
        if row["kind"] != "type hints":
            right = score(row, f"Here it is:\n\n{fenced(row['expected'])}\n\nI have changed it.")
            assert (right["parses"], right["correct"]) == (1, 1)
            assert 0.7 < right["kept"] <= 1
        assert score(row, "```python\ndef (")["parses"] == 0


FILE = '''"""A module."""
# One.
def area(width, height=2, name="a"):
    """Return it. # not a comment"""
    total = width * height  # two
    total += 1
    # Three.
    return total
# Four.

def other(x):
    return "# five"
'''


@pytest.mark.parametrize(
    ("kind", "words", "line"),
    [
        (
            "rename",
            "variable `total` in the function `area` to `total_value`",
            "    total_value += 1",
        ),
        (
            "default",
            "parameter `name` of the function `area` from `\"a\"` to `'a2'`",
            "name='a2'):",
        ),
        ("parameter", "`verbose=False` at the end", "verbose=False):"),
    ],
)
def test_each_kind_of_edit(kind, words, line):
    row = row_of(kind, FILE)
    assert words in row["instruction"]
    assert line in row["expected"]
    assert len(row["expected"].splitlines()) == len(FILE.splitlines())


def test_comments_are_removed_and_nothing_else():
    file = FILE + "x = 1\n" * 20
    expected = row_of("comments", file)["expected"]
    assert "One" not in expected
    assert "# not a comment" in expected
    assert '"# five"' in expected
    assert "    total = width * height\n    total += 1\n    return total\n" in expected
    assert ast.dump(ast.parse(expected)) == ast.dump(ast.parse(file))


def test_type_hints_may_be_any():
    row = row_of("type hints", FILE)
    hinted = FILE.replace("x):", "x: str) -> str:")
    assert score(row, hinted)["correct"] == 1
    assert score(row, hinted.replace("five", "six"))["correct"] == 0


def test_the_code_of_an_answer():
    assert code_of("Sure.\n```python\na = 1\n```\nIt is 1.") == "a = 1\n"
    assert code_of("```\na = 1\n") == "a = 1\n"  # cut off
    assert code_of("a = 1") == "a = 1"


def test_the_task_asks_an_assistant_and_predicts_the_file():
    task = load_task("edits", samples=5, chat=False)
    assert {sample.category for sample in task.samples} == set(EDITS)
    for sample in task.samples:
        assert sample.prompt.endswith("\n```")
        assert sample.prediction in sample.prompt
    (message,) = load_task("edits", samples=1, chat=True).samples[0].prompt
    assert message["role"] == "user"
