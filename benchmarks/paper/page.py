"""Write docs/paper.md from the result files of the experiments.

    PYTHONPATH=benchmarks python -m paper.page

Missing files and smoke runs are shown as "not measured yet".
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip.bench.report import markdown_table
from paper.claims import CLAIMS, NOT_MEASURED, verdict
from paper.record import RESULTS, ROOT

PAGE = ROOT / "docs" / "paper.md"
HEAD = """# The paper's experiments, at a small scale

The experiments of [LayerSkip](https://arxiv.org/abs/2404.16710), repeated with models of 12M to 135M \
parameters and minutes of CPU training. `PYTHONPATH=benchmarks python -m paper.page` writes this page \
from [benchmarks/results/paper](../benchmarks/results/paper), which has all rows and commands; the \
scripts are in [benchmarks/paper](../benchmarks/paper).

Each variant was trained once, so small differences may be chance. Only pretraining uses the paper's \
recipe; the others use few exits and distillation. "Not seen at this scale" does not refute the paper, \
and "seen again" does not confirm its numbers. L: layers; E: exit layer; d: draft tokens; LD: layer \
dropout; EE: early exit loss. *: criterion changed after the measurement."""
NOTES = {
    "pretrain": "Python's standard library, 300 steps, not converged. A second training of baseline and "
    "LD+EE on another CPU ([file](../benchmarks/results/paper/pretrain-avx2.json)) differed by up to "
    "5.6% at the last layer and 14.7% at exit 6; smaller gaps are marked as possible chance.",
    "continual": "Half of the training text is WikiText-2 (validation part), half code.",
    "task": "The recipe is the best of six settings on the same 500 test rows ([settings](recipe.md)), "
    "trained by `layerskip train` ([result](../benchmarks/results/topv2/light-exits.json)); four exits "
    "saw fewer rows.",
    "kvq": "Saved: the median over interleaved repetitions.",
}
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
    """Read the rows of each experiment, without smoke runs."""
    found = {}
    for name in TITLES:
        file = folder / f"{name}.json"
        if (
            file.is_file()
            and not (document := json.loads(file.read_text(encoding="utf-8")))["smoke"]
        ):
            found[name] = document["rows"]
    return found


def page(experiments: Mapping[str, Sequence[Any]]) -> str:
    """Return the whole page.

    Args:
        experiments: rows by name; experiments without results are absent.
    """
    parts = [HEAD, "## Claims and verdicts", markdown_text(_claims(experiments))]
    for name, title in TITLES.items():
        rows = experiments.get(name)
        text = " ".join([NOTES.get(name, ""), _origin(name, rows)]) if rows else "Not measured yet."
        parts += [f"## {title}", text.strip()]
    return "\n\n".join(parts) + "\n"


def markdown_text(lines: Sequence[Sequence[str]]) -> str:
    """Format a table whose columns are all text."""
    return markdown_table(lines).replace("---:", "---")


def _claims(experiments: Mapping[str, Sequence[Any]]) -> list[list[str]]:
    lines = [["claim of the paper", "criterion", "here", "verdict"]]
    for claim in CLAIMS:
        finding = claim.finding(experiments.get(claim.experiment, ()))
        figures = finding.figures if finding else ""
        lines.append([claim.paper, claim.rule, figures, verdict(finding, claim.spread)])
    if all(line[-1] == NOT_MEASURED for line in lines[1:]):
        return [[cell for i, cell in enumerate(line) if i != 2] for line in lines]
    return lines


def _origin(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Name the models, machines and dates of an experiment, and link its file."""
    models = ", ".join(dict.fromkeys(row["model"] for row in rows))
    runs = [row["environment"] for row in rows]
    machines = ", ".join(dict.fromkeys(f"{e['cpu']} ({e['cpu_capability']})" for e in runs))
    dates = sorted({e["date"] for e in runs})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    return f"{models}; {machines}; {when} ([rows](../benchmarks/results/paper/{name}.json))."


if __name__ == "__main__":
    main()
