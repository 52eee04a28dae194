"""The result files: all are indexed, and all are quoted by a page."""

import json
import re
from pathlib import Path

from index import INDEX, RESULTS, index

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "src/layerskip/checkpoints").glob("*.md")),
]
GROUPS = ("bench-topv2/", "paper/")  # one run, or one page, with several files


def quoted(page):
    return re.findall(r"benchmarks/results/([\w./-]+?\.(?:json|md|png))\b", page.read_text())


def test_index_is_that_of_the_result_files():
    assert json.loads(INDEX.read_text()) == index(), "run python benchmarks/index.py"


def test_quoted_results_exist():
    names = [name for page in PAGES for name in quoted(page)]
    assert [name for name in names if not (RESULTS / name).is_file()] == []


def test_every_result_is_quoted():
    stems = {name.rsplit(".", 1)[0] for page in PAGES for name in quoted(page)}
    names = [str(f.relative_to(RESULTS)) for f in RESULTS.rglob("*") if f.is_file() and f != INDEX]
    unquoted = [
        name
        for name in names
        if name.rsplit(".", 1)[0] not in stems and not name.startswith(GROUPS)
    ]
    assert unquoted == []
