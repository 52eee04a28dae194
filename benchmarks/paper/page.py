"""Write docs/paper.md from the result files of the experiments.

    PYTHONPATH=benchmarks python -m paper.page

Claims without a file, or with that of a smoke run, are shown as "not measured yet".
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paper.claims import CLAIMS, NOT_MEASURED, NOT_SEEN, PERHAPS, SEEN, verdict
from paper.record import RESULTS, ROOT
from paper.rules import perplexities

PAGE = ROOT / "docs" / "paper.md"
HEAD = """# The paper's experiments, at a small scale

Of {claims} claims of [LayerSkip](https://arxiv.org/abs/2404.16710), {seen} were seen again, {perhaps} \
perhaps by chance, and {not_seen} were not seen with models of 12M to 135M parameters and minutes to \
hours of CPU training. "Not seen" does not refute the paper, and "seen again" does not confirm its \
numbers: each variant was trained once, two of pretraining twice, and only pretraining uses the \
paper's recipe; the others use few exits and distillation.

`PYTHONPATH=benchmarks python -m paper.page` writes this page from the result files. The criteria are \
those of `benchmarks/paper/claims.py`; most were written before the measurement, and those that were \
changed afterwards are marked *."""
CLAIMS_HEAD = """## Claims

Section 4.1 of the paper is training, 4.2 early exit, 4.3 self-speculative decoding. L: layers; E: exit \
layer; d: draft tokens; LD: layer dropout; EE: early exit loss."""
NOTES = {
    "pretrain": "Python's standard library, 300 steps, not converged",
    "continual": "half text (WikiText-2, validation part; CNN/DailyMail), half code, 600 steps",
    "domain": "Python code; decoding of HumanEval",
    "task": "1,962 test rows that are not in training; late exit: trained from the built-in checkpoint",
    "kvq": "saved: the median over interleaved repetitions",
    "speculation": "LD-EE: trained from scratch; the other checkpoint on TOPv2",
}
TITLES = {
    "pretrain": "from scratch",
    "continual": "continual",
    "domain": "code",
    "task": "TOPv2",
    "kvq": "KV cache",
    "speculation": "draft length",
}
REPEAT = "pretrain-seed-1"
LONG = "pretrain-long"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.page", description="Write docs/paper.md."
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    options.output.write_text(written(options.results), encoding="utf-8")


def written(folder: Path) -> str:
    """Return the page of a folder of result files."""
    return page(read(folder), read(folder, (REPEAT, LONG)))


def read(folder: Path, names: Iterable[str] = TITLES) -> dict[str, list[Any]]:
    """Read the rows of each result file, without smoke runs."""
    found = {}
    for name in names:
        file = folder / f"{name}.json"
        if (
            file.is_file()
            and not (document := json.loads(file.read_text(encoding="utf-8")))["smoke"]
        ):
            found[name] = document["rows"]
    return found


def page(
    experiments: Mapping[str, Sequence[Any]], others: Mapping[str, Sequence[Any]] | None = None
) -> str:
    """Return the whole page.

    Args:
        experiments: rows by name; experiments without results are absent.
        others: rows of further trainings of variants of `pretrain`: a second one of two variants
            (`REPEAT`), and the longer one of the checkpoint whose drafts are timed (`LONG`).
    """
    others = others or {}
    lines = [["claim of the paper", "section", "here", "verdict"]]
    verdicts = []
    for claim in CLAIMS:
        finding = claim.finding(experiments.get(claim.experiment, ()))
        verdicts.append(verdict(finding, claim.spread))
        mark = " *" if claim.rule.endswith("*") else ""
        section = f"{claim.section}, {TITLES[claim.experiment]}"
        figures = finding.figures if finding else ""
        lines.append([claim.paper, section, figures, verdicts[-1] + mark])
    head = HEAD.format(
        claims=len(CLAIMS),
        seen=verdicts.count(SEEN),
        perhaps=verdicts.count(SEEN + PERHAPS),
        not_seen=sum(one.startswith((NOT_SEEN, NOT_MEASURED)) for one in verdicts),
    )
    paths = ", ".join(f"`benchmarks/results/paper/{name}.json`" for name in experiments)
    parts = [head, CLAIMS_HEAD, f"Results: {paths}.", table(lines), "## Experiments"]
    origins = [["experiment", "data", "model, machine, date", "file"]]
    origins += [_origin(name, rows) for name, rows in experiments.items()]
    parts.append(table(origins))
    if REPEAT in others:
        parts.append(_repeated(experiments["pretrain"], others[REPEAT]))
    if LONG in others:
        parts.append(_longer(others[LONG][0]))
    return "\n\n".join(parts) + "\n"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    heading, *rest = lines
    return "\n".join(f"|{'|'.join(line)}|" for line in (heading, ["---"] * len(heading), *rest))


def _origin(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the data, models, machines and dates of an experiment, and its file."""
    models = ", ".join(dict.fromkeys(Path(row["model"]).name for row in rows))
    runs = [row["environment"] for row in rows]
    machines = ", ".join(dict.fromkeys(f"{e['cpu']} ({e['cpu_capability']})" for e in runs))
    last = max(e["date"] for e in runs)
    return [TITLES[name], NOTES[name], f"{models}; {machines}; {last}", f"`{name}.json`"]


def _repeated(rows: Sequence[Mapping[str, Any]], repeat: Sequence[Mapping[str, Any]]) -> str:
    """Compare a second training with the first: smaller gaps than these may be chance."""
    first = {row["variant"]: perplexities(row["exits"]) for row in rows}
    gaps = []
    for row in repeat:
        for e in (6, 12):
            ours, again = first[row["variant"]][e], perplexities(row["exits"])[e]
            gaps.append(
                f"{row['variant']}, E = {e}: {again:.2f} against {ours:.2f} ({again / ours - 1:+.1%})"
            )
    text = "; ".join(gaps)
    return (
        f"A second training from scratch with another seed (`benchmarks/results/paper/{REPEAT}.json`"
        f" against `benchmarks/results/paper/pretrain.json`) gave {text}. Smaller gaps are marked as"
        " possible chance."
    )


def _longer(row: Mapping[str, Any]) -> str:
    """Describe the checkpoint whose drafts are timed."""
    by_exit = perplexities(row["exits"])
    figures = ", ".join(f"{by_exit[e]:.2f} at E = {e}" for e in (3, 6, 9, 12))
    return (
        f"LD-EE, whose drafts are timed, was trained for {row['trained']['steps']:,} steps on"
        f" {', '.join(row['corpus']['sources'])} (`benchmarks/results/paper/{LONG}.json`); its"
        f" perplexity on held-out files is {figures}."
    )


if __name__ == "__main__":
    main()
