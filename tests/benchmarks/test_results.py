"""The result files: all are indexed, and all are quoted by a page that may have figures."""

import json
import re
from pathlib import Path

from draft_constants import DEFAULTS, VALUES
from index import INDEX, RESULTS, index

from layerskip.decoding import controller, datastore, drafters

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


def test_the_ablation_is_of_all_of_today_s_constants():
    """Numbers that are set by hand in `decoding/`, but for the structure of an index or a hash."""
    modules = (controller, drafters, datastore)
    numbers = {
        name
        for module in modules
        for name, value in vars(module).items()
        if name.isupper() and isinstance(value, int | float | tuple)
    }
    assert numbers - {"FAR", "MIN_MATCH", "_FACTOR", "_BITS"} <= VALUES.keys()
    document = json.loads((RESULTS / "draft-constants.json").read_text())
    assert document["defaults"] == json.loads(json.dumps(DEFAULTS))
    assert {row["constant"] for row in document["rows"]} == {None, *VALUES}
