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
from paper.checkpoints import version
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

Every variant was trained once, with one seed: small differences may be chance. "Recipe" is what the \
last table of each section says; only that of pretraining is the paper's own, the others are what a \
budget of minutes needed (few exits, of which one may have a loss at every step, and distillation). \
"Not seen at this scale" does not say that the paper is wrong, nor "seen again" that its figures hold \
here. Exits, rounds and the other words are in the [glossary](glossary.md); L is the number of layers, \
E the layers run, d the draft tokens."""
NOTES = {
    "pretrain": "Code and docstrings of Python's standard library. After 300 steps no variant has "
    "converged: the last layer's gains over the baseline say how soon each of them learns, not where it "
    "would end. All had one learning rate, 1e-3, where the paper halves it without layer dropout. The "
    "variants were trained at several commits (below) and, as the dates and speeds of "
    "other files say, on two kinds of CPU with AVX-512. Baseline and LD+EE were trained before at yet "
    "another commit on a CPU without it ([file](../benchmarks/results/paper/pretrain-avx2.json)): their "
    "last layers came to 501.3 and 326.5 there, 2.6 and 5.6% more than here, and exit 6 of the baseline "
    "to 14.7% more. Where variants are nearer to each other than that, the verdict says that it may be "
    "chance.",
    "continual": "Half of the text is the validation part of the corpus whose test part is asked, the "
    "other half code.",
    "task": "The recipe, two light exits, was chosen after heavier ones had cost the last layer more: "
    "the best of six settings, judged on these 500 rows ([what each costs](recipe.md)), against one "
    "control. 13% of the test's utterances are among those to train on ([the data set is "
    "so](tasks.md)). Four exits are for the claims that compare exits; they were trained on fewer rows. "
    "Recipe and control were trained by `layerskip train`, with the commands in "
    "[topv2-light-exits.json](../benchmarks/results/topv2-light-exits.json), four exits by the script. "
    "On another machine a checkpoint of more rows came to 2.18x at E = 4 and 2.06x at E = 8 with d = 4 "
    "([report](../benchmarks/results/speed-topv2-trained.md)): how much is gained depends on how fast "
    "weights are read there.",
    "kvq": "The milliseconds are medians over all repetitions, each way for itself. What was saved is "
    "the median of what each repetition saved, in which both ways took turns: where a machine is "
    "restless the two need not agree.",
    "speculation": "The checkpoint from scratch is that of [an earlier training](../benchmarks/results/"
    "paper/pretrain-avx2.json) of LD+EE than the one that the table of perplexities has.",
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
    """The rows of each experiment that was really measured."""
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
        parts.append(f"## {title}")
        if not rows:
            parts.append("Not measured yet.")
        else:
            parts += [*filter(None, [NOTES.get(name)]), *TABLES[name](rows)]
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
        lines.append([claim.paper, claim.rule, figures, verdict(finding, claim.spread)])
    if all(line[-1] == NOT_MEASURED for line in lines[1:]):
        return [[cell for i, cell in enumerate(line) if i != 2] for line in lines]
    return lines


def _origins(rows: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Where each row comes from."""
    lines = [["row", "model", "learnt", "recipe", "command", "commit", "date", "machine"]]
    for row in rows:
        here = row["environment"]
        learnt = row.get("trained")
        amount = f"{learnt['steps']} steps, {learnt['rows']:,} rows" if learnt else ""
        if learnt and "tokens" in learnt:
            amount += f", {learnt['tokens']:,} tokens"
        machine = (
            f"{here['cpu']}, {here['cpu_capability']}, {here['threads']} threads, {here['dtype']}"
        )
        earlier = version(row["model"]) != row.get("version")
        model = f"{row['model']} (an earlier one)" if earlier else row["model"]
        head = [row["variant"], model, amount, _recipe(learnt or {})]
        lines.append([*head, f"`{here['command']}`", here["commit"], here["date"], machine])
    return lines


def _recipe(learnt: Mapping[str, Any]) -> str:
    """A recipe in a few words."""
    recipe = learnt.get("recipe")
    if not recipe:
        return ""
    words = []
    if "LD" in recipe["variant"] and recipe["p_max"]:
        over = recipe["dropout_over_layers"], recipe["dropout_over_steps"]
        words.append(f"p_max {recipe['p_max']} ({over[0]} over layers, {over[1]} over steps)")
    if "EE" in recipe["variant"] and (recipe["curriculum"] != "none" or recipe["fixed_exits"]):
        if recipe["curriculum"] != "none":
            among = ", ".join(map(str, recipe["exits"] or ["all"]))
            words.append(f"exits {among}, {recipe['curriculum']}")
        if recipe["fixed_exits"]:
            words.append(f"exit {', '.join(map(str, recipe['fixed_exits']))} at every step")
        words.append(f"weights {recipe['exit_weighting']}, e_scale {recipe['e_scale']}")
        if recipe["distillation_weight"]:
            words.append(f"distilled, weight {recipe['distillation_weight']}")
    return "; ".join(words) or "none"


if __name__ == "__main__":
    main()
