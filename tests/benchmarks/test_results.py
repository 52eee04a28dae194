"""The result files: all are indexed, and all are quoted by a page that may have figures."""

import json
import re
from pathlib import Path

from index import INDEX, RESULTS, index

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs/benchmarks.md",
    ROOT / "docs/exit-adapters.md",
    ROOT / "docs/paper.md",
]


def quoted(page):
    return re.findall(r"benchmarks/results/([\w./-]+?\.json)\b", page.read_text())


def test_index_is_that_of_the_result_files():
    assert json.loads(INDEX.read_text()) == index(), "run python benchmarks/index.py"


def test_quoted_results_exist():
    names = {name for page in PAGES for name in quoted(page)} - {INDEX.name}
    assert [name for name in sorted(names) if not (RESULTS / name).is_file()] == []


def test_every_result_is_quoted():
    names = {name for page in PAGES for name in quoted(page)}
    files = {str(file.relative_to(RESULTS)) for file in RESULTS.rglob("*") if file.is_file()}
    assert files - names == {INDEX.name} - names
