"""docs/paper.md, written from the files of the experiments and from nothing else.

    PYTHONPATH=benchmarks python -m paper.page

A file that is not there, or a smoke run's, makes "not measured yet".
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.bench.report import markdown_table
from paper.claims import CLAIMS, NOT_MEASURED, verdict
from paper.record import RESULTS, ROOT
from paper.tables import TABLES

PAGE = ROOT / "docs" / "paper.md"
HEAD = """# The paper's experiments, at a small scale

Do the findings of [LayerSkip](https://arxiv.org/abs/2404.16710) (models of billions of \
parameters, many GPUs) show with small models and minutes of a CPU? This page is written by \
`PYTHONPATH=benchmarks python -m paper.page` from the files in \
[benchmarks/results](../benchmarks/results) (`paper/*.json`) and says nothing that is not in them. The \
scripts are in [benchmarks/paper](../benchmarks/paper); each begins with its commands.

Every variant was trained once, with one seed: small differences may be chance. "Not seen at this \
scale" does not say that the paper is wrong, nor "seen again" that its figures hold here. Exits, rounds \
and the other words are in the [glossary](glossary.md); L is the number of layers, E the layers run, d \
the draft tokens."""
TITLES = {
    "pretrain": "Pretraining from scratch",
    "continual": "Continual pretraining",
    "domain": "Finetuning on a domain: code",
    "task": "Finetuning on a task: TOPv2",
    "kvq": "Reuse of the cache",
    "speculation": "Draft length",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.page", description="Write docs/paper.md."
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    options.output.write_text(page(read(options.results)), encoding="utf-8")


def read(folder: Path) -> dict[str, list[Any]]:
    """The rows of each experiment that was really measured."""
    found = {}
    for name in TITLES:
        file = folder / f"{name}.json"
        if file.is_file() and not (document := json.loads(file.read_text()))["smoke"]:
            found[name] = document["rows"]
    return found


def page(experiments: Mapping[str, Sequence[Any]]) -> str:
    """The whole page.

    Args:
        experiments: name -> rows; those that were not measured are not among them.
    """
    parts = [
        HEAD,
        "## What the paper says, and what was found",
        markdown_text(_claims(experiments)),
    ]
    for name, title in TITLES.items():
        rows = experiments.get(name, ())
        parts += [f"## {title}", *(TABLES[name](rows) if rows else ["Not measured yet."])]
        if rows:
            parts.append(markdown_text(_origins(rows)))
    return "\n\n".join(parts) + "\n"


def markdown_text(lines: Sequence[Sequence[str]]) -> str:
    """A table whose columns are all words."""
    return markdown_table(lines).replace("---:", "---")


def _claims(experiments: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    lines = [["the paper", "counts as seen again if", "here", "verdict"]]
    for claim in CLAIMS:
        finding = claim.finding(experiments.get(claim.experiment, ()))
        figures = finding.figures if finding else ""
        lines.append([claim.paper, claim.rule, figures, verdict(finding)])
    if all(line[-1] == NOT_MEASURED for line in lines[1:]):
        return [[cell for i, cell in enumerate(line) if i != 2] for line in lines]
    return lines


def _origins(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Where each row comes from."""
    lines = [["row", "model", "learnt", "command", "commit", "date", "machine"]]
    for row in rows:
        here = row["environment"]
        learnt = row.get("trained")
        amount = f"{learnt['steps']} steps, {learnt['rows']:,} rows" if learnt else ""
        if learnt and "tokens" in learnt:
            amount += f", {learnt['tokens']:,} tokens"
        machine = f"{here['cpu']}, {here['threads']} threads, {here['dtype']}"
        command = f"`{here['command']}`"
        lines.append(
            [row["variant"], row["model"], amount, command, here["commit"], here["date"], machine]
        )
    return lines


if __name__ == "__main__":
    main()
