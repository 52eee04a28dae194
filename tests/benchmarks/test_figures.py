"""Figures of the pages: each is in a result file that its section names.

A figure is a number with a unit of a measurement, and, in a table of a section that names result files,
any number below its head outside the first column. It has to equal a number of these files, rounded to
the printed digits. Derived from them may be: a percentage of a share, a change "A against B (x%)", a
speedup over the row of plain decoding or over llama.cpp, the time that reuse of the cache saves, and
other units of seconds and bytes.
"""

import functools
import itertools
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import tables
from index import RESULTS
from paper.rules import share_saved

ROOT = Path(__file__).parents[2]
# Pages that may have figures; all others of PLAIN have none.
MEASURED = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/benchmarks.md",
    "docs/exit-adapters.md",
    "docs/paper.md",
)
PLAIN = ("docs/index.md", "docs/get-started.md", "docs/how-to/*.md", "docs/concepts/*.md")
# Figures that are no measurements, by page; "" is for all.
SETTINGS = {
    "": {"95%"},
    "CONTRIBUTING.md": {"2%"},
    "docs/how-to/bench.md": {"80%", "100%"},
}
OTHER_COLUMNS = {"section", "data", "model, machine, date"}

NUMBER = r"(?<![\w.])(?<!\w-)[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?"
FIGURE = re.compile(rf"({NUMBER})(x(?!\w)|%| (?:tokens/s|ms|s|minutes|MB|GB)(?!\w))?(?![\w/])")
NAMED = re.compile(r"benchmarks/results/([\w/-]+\.json)")
CHANGE = re.compile(rf"({NUMBER}) against ({NUMBER}) \(({NUMBER})%\)")
SETTING = re.compile(r"\b[A-Z] = \d+( of \d+)?|\b[a-z] = \d+|\d+ settings|\d+ pairs|\d+-bit")
SPEEDS = ("x", "%", "tokens/s")  # where no file is named, sizes and times are settings
# Unit -> key of the number in the file, and its factors.
UNITS = {
    "x": (r"speedup|ratio|over", (1,)),
    "%": ("", (100,)),
    "tokens/s": (r"tokens_per|tokens/s", (1,)),
    "ms": (r"ms|_s\b|seconds", (1, 1000)),
    "s": (r"_s\b|seconds| s\b", (1,)),
    "minutes": (r"minutes|_s\b|seconds", (1, 1 / 60)),
    "MB": (r"bytes|mb", (1, 1e-6)),
    "GB": (r"bytes", (1e-9,)),
    "": ("", (1,)),
}


def pages() -> list[Path]:
    patterns = (*MEASURED, *PLAIN)
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]


def sections(text: str) -> list[str]:
    """Split a page at its headings, without blocks of code."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.split(r"^(?=#+ )", without_code, flags=re.MULTILINE)


def unfounded(page: str, text: str) -> list[str]:
    """Return the figures of a page that are in no file which their section names."""
    allowed = SETTINGS[""] | SETTINGS.get(page, set())
    return [
        figure
        for section in sections(text)
        for figure in figures(section)
        if figure not in allowed and not is_founded(figure, tuple(NAMED.findall(section)))
    ]


def figures(section: str) -> Iterator[str]:
    """Yield the figures of a section; numbers without a unit count in tables of measured figures."""
    text = re.sub(r"`[^`\n]*`|\]\([^)]*\)|<[^>]*>|\d{4}-\d\d-\d\d", " ", section)
    text = re.sub(r"(?<=\d)-(?=\d)", " ", SETTING.sub(" ", text))
    has_file = NAMED.search(section) is not None
    units = UNITS if has_file else SPEEDS
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
            yield from figures_of(line, [unit for unit in units if unit])
        elif not header:
            header = cells_of(line)
        else:
            for column, cell in list(zip(header, cells_of(line), strict=True))[1:]:
                if column not in OTHER_COLUMNS:
                    yield from figures_of(cell, units)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip()[1:-1].split("|")]


def figures_of(text: str, units: Collection[str]) -> Iterator[str]:
    for a, b, change in CHANGE.findall(text):
        if f"{number(a) / number(b) - 1:+.1%}" == f"{change}%":
            text = text.replace(f"({change}%)", "")
    for value, unit in FIGURE.findall(text):
        is_multiple = unit == "x" and "." not in value  # 3x is no measurement
        if unit.strip() in units and not is_multiple:
            yield value + unit


@functools.cache
def is_founded(figure: str, files: tuple[str, ...]) -> bool:
    match = FIGURE.fullmatch(figure)
    assert match is not None
    printed, unit = number(match[1]), (match[2] or "").strip()
    key, factors = UNITS[unit]
    tolerance = 0.5 * 10.0 ** -len(match[1].partition(".")[2]) + 1e-9
    return any(
        abs(value * factor - printed) <= tolerance
        for name, value in measured(files)
        if re.search(key, name)
        for factor in factors
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


@functools.cache
def measured(files: tuple[str, ...]) -> list[tuple[str, float]]:
    """Return the numbers of the files with their keys, and speedups over plain rows and llama.cpp."""
    documents = [json.loads((RESULTS / file).read_text()) for file in files]
    rows = [row for one in documents for row in rows_of(one)]
    plain = {row.get("batch"): row for row in rows if row.get("mode") == "plain"}
    speedups = [
        ("speedup", row[key] / plain[row["batch"]][key])
        for row in rows
        for key in ("tokens_per_s", "tokens_per_cpu_s")
        if "batch" in row and key in row and plain
    ]
    speedups += [
        ("over llama.cpp", ratio)
        for document in documents
        for run in tables.runs_of(document)
        if (best := tables.fastest(run, "llama.cpp"))
        for row in run["rows"]
        if row["system"] == "layerskip" and "speedup_without_loops" in row
        for ratio in (tables.over(row, best), row[tables.WITH_PROMPT] / best[tables.WITH_PROMPT])
    ]
    saved = [("saved", share_saved(row)) for row in rows if "ms_per_token_of_repeats" in row]
    return [*itertools.chain.from_iterable(map(leaves, documents)), *speedups, *saved]


def rows_of(document: object) -> list[dict]:
    rows = document.get("rows") if isinstance(document, dict) else None
    return rows if isinstance(rows, list) else []


def leaves(value: object, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name != "environment":
                yield from leaves(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_figures_are_in_the_files_that_their_sections_name(page):
    assert unfounded(str(page.relative_to(ROOT)), page.read_text()) == []


def test_figures_need_a_file_and_its_digits():
    row = json.loads((RESULTS / "demo.json").read_text())["scenes"][0]["rows"][1]
    speedup, speed = f"{row['speedup']:.2f}x", f"{row['tokens_per_s']:.0f} tokens/s"
    text = f"## Speed\n\nCommands: {speedup}, {speed} (`benchmarks/results/demo.json`).\n"
    assert unfounded("", text) == []
    wrong = f"{row['speedup'] + 0.01:.2f}x"
    assert unfounded("", text.replace(speedup, wrong)) == [wrong]
    wrong = f"{row['tokens_per_s'] - 1:.0f} tokens/s"
    assert unfounded("", text.replace(speed, wrong)) == [wrong]
    assert unfounded("", text.replace("demo.json", "topv2-checkpoint.json")) == [speedup, speed]
    assert unfounded("", text.replace("(`", "\n## Files\n(`")) == [speedup, speed]
    table = "|a|b|\n|---|---|\n|7|{}|\n\n`benchmarks/results/topv2-checkpoint.json`\n"
    assert unfounded("", table.format("1,962 rows, 78,249 tokens")) == []
    assert unfounded("", table.format("1,962 rows, 78,250 tokens")) == ["78,250"]


def test_most_changed_digits_are_found():
    """A wrong digit may give another number of the same file, but seldom does."""
    found = []
    for section in sections((ROOT / "docs" / "benchmarks.md").read_text()):
        files = tuple(NAMED.findall(section))
        for figure in figures(section):
            if "." in figure and not figure.startswith("0"):
                digit = re.search(r"\d(?=\D*$)", figure)
                changed = (
                    f"{figure[: digit.start()]}{(int(digit[0]) + 3) % 10}{figure[digit.end() :]}"
                )
                found.append(not is_founded(changed, files))
    assert len(found) > 100
    assert sum(found) / len(found) > 0.7
