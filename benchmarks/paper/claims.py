"""Claims of the paper and the criteria by which they count as seen again.

Most criteria were written before their rows were measured; the others end in "*".
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paper import rules
from paper.rules import Finding, Row
from paper.task import BUILT_IN

SEEN, NOT_SEEN, NOT_MEASURED = "seen again", "not seen at this scale", "not measured yet"
PERHAPS = ", perhaps by chance"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper with its criterion.

    Attributes:
        experiment: name of the result file.
        section: of the paper's method that the claim is about: 4.1 training, 4.2 early exit, 4.3
            self-speculative decoding.
        paper: the claim, with the numbers of the paper.
        rule: the criterion in words.
        judge: maps the rows of `needs`, in order, to a finding, or None if they lack a value.
        needs: required variants; () passes all rows.
        spread: relative difference between repetitions; a smaller gap may be chance.
    """

    experiment: str
    section: str
    paper: str
    rule: str
    judge: Callable[..., Finding | None]
    needs: Sequence[str] = ()
    spread: float = 0.0

    def finding(self, rows: Sequence[Row]) -> Finding | None:
        """Apply the criterion to the rows of an experiment; None = not measured.

        Variants trained on different numbers of rows or kinds of machines, or measured on different
        texts, are not compared.
        """
        by_variant = {row["variant"]: row for row in rows}
        if not rows or any(name not in by_variant for name in self.needs):
            return None
        needed = [by_variant[name] for name in self.needs]
        learnt = {row["trained"].get("rows") for row in needed if "trained" in row}
        corpora = {json.dumps(row.get("corpus"), sort_keys=True) for row in needed}
        machines = {row.get("environment", {}).get("cpu_capability") for row in needed}
        if max(map(len, (learnt, corpora, machines))) > 1:
            return None
        return self.judge(*needed or rows)


def verdict(finding: Finding | None, spread: float = 0.0) -> str:
    """Return the verdict shown on the page."""
    if finding is None:
        return NOT_MEASURED
    by_chance = finding.gap is not None and finding.gap < spread
    return (SEEN if finding.holds else NOT_SEEN) + by_chance * PERHAPS


# Relative differences of a second training with another seed: at the last layer and at exit 6.
SPREAD, SPREAD_AT_EXITS = 0.118, 0.069
# Half of the bootstrap interval of the fastest setting, relative to its speedup.
_SPREAD_OF_SPEEDS = 0.087


CLAIMS = (
    Claim(
        experiment="pretrain",
        section="4.2",
        needs=("LD+EE", "baseline"),
        paper="From scratch, the recipe makes early exits more accurate than plain training does",
        rule="perplexity below the baseline's at every exit from L/4 to 3L/4",
        judge=rules.compared(rules.lower_in_the_middle, "exits"),
    ),
    Claim(
        experiment="pretrain",
        section="4.1",
        needs=("LD+EE", "baseline"),
        paper="From scratch, the last layer suffers little from the recipe",
        rule="last-layer perplexity at most 2% above the baseline's",
        judge=rules.compared(rules.last_at_most, "exits", 1.02),
        spread=SPREAD,
    ),
    Claim(
        experiment="pretrain",
        section="4.1",
        needs=("LD+EE", "LD", "EE"),
        paper="The recipe needs both of its parts: LD+EE against LD and EE alone",
        rule="perplexity at the middle exit below that of either part",
        judge=rules.both_parts,
        spread=SPREAD_AT_EXITS,
    ),
    Claim(
        experiment="pretrain",
        section="4.1",
        needs=("LD+EE", "LD+EE uniform over layers"),
        paper="Later layers are dropped more than early ones: D(l) grows exponentially",
        rule="last-layer perplexity at least 1% below that of a uniform rate",
        judge=rules.compared(rules.last_at_most, "exits", 0.99),
        spread=SPREAD,
    ),
    Claim(
        experiment="pretrain",
        section="4.1",
        needs=("LD+EE", "LD+EE constant over steps"),
        paper="From scratch, dropout grows over training: S(t) is exponential",
        rule="last-layer perplexity at least 1% below that of a constant rate",
        judge=rules.compared(rules.last_at_most, "exits", 0.99),
        spread=SPREAD,
    ),
    Claim(
        experiment="pretrain",
        section="4.1",
        needs=("LD+EE", "LD+EE gradual"),
        paper="For pretraining the curriculum is rotational, not gradual",
        rule="last-layer perplexity at least 1% below that of the gradual curriculum",
        judge=rules.compared(rules.last_at_most, "exits", 0.99),
        spread=SPREAD,
    ),
    Claim(
        experiment="pretrain",
        section="4.1",
        needs=("LD+EE", "LD+EE all exits"),
        paper="A curriculum serves the last layer better than a loss at all exits in all steps",
        rule="last-layer perplexity at least 1% below that of all exits",
        judge=rules.compared(rules.last_at_most, "exits", 0.99),
        spread=SPREAD,
    ),
    Claim(
        experiment="continual",
        section="4.2",
        needs=("recipe", "before"),
        paper="Continual pretraining makes a checkpoint's early exits more accurate",
        rule="WikiText perplexity below that before at every exit from L/4 to 3L/4",
        judge=rules.compared(rules.lower_in_the_middle, "text"),
    ),
    Claim(
        experiment="continual",
        section="4.1",
        needs=("recipe", "before"),
        paper="The last layer of a continually pretrained checkpoint loses little",
        rule="last-layer perplexity at most 5% above that before, on WikiText and code *",
        judge=lambda after, before: rules.last_of_both_at_most(after, before, 1.05),
    ),
    Claim(
        experiment="continual",
        section="4.1",
        needs=("recipe", "control"),
        paper="The same, against as much training without the recipe",
        rule="last-layer perplexity at most 5% above the control's, on WikiText and code *",
        judge=lambda recipe, control: rules.last_of_both_at_most(recipe, control, 1.05),
    ),
    Claim(
        experiment="domain",
        section="4.3",
        needs=("recipe",),
        paper="Finetuned on code, self-speculative decoding of HumanEval is 1.82x faster",
        rule="1.82x or more at some (E, d)",
        judge=lambda row: rules.best(row["timed"], 1.82),
    ),
    Claim(
        experiment="domain",
        section="4.3",
        needs=("recipe",),
        paper="45% of the drafts are accepted there (E = 6 of 32, d = 12)",
        rule="45% or more at d = 12 and the exit nearest to 6/32 of the layers",
        judge=rules.code_acceptance,
    ),
    Claim(
        experiment="domain",
        section="4.3",
        needs=("before", "control", "recipe"),
        paper="It is the recipe that makes a checkpoint its own drafter",
        rule="above 1.1x after finetuning, and nowhere before or without the recipe",
        judge=rules.only_after,
    ),
    Claim(
        experiment="task",
        section="4.3",
        needs=(BUILT_IN,),
        paper="On TOPv2 self-speculative decoding is up to 2.0x faster",
        rule="2.0x or more at the exit of the built-in checkpoint *",
        judge=lambda row: rules.best(row["timed"], 2.0),
    ),
    Claim(
        experiment="task",
        section="4.3",
        needs=("recipe",),
        paper="The earlier the exit the faster: 1.24x, 1.64x, 2.0x at E = 18, 12, 6 of 24",
        rule="speedup falls from exit to exit, over three or more that had a loss *",
        judge=rules.earlier_is_faster,
    ),
    Claim(
        experiment="task",
        section="4.3",
        needs=(BUILT_IN,),
        paper="76.0% of the drafts are accepted at E = 6 of 24, d = 8",
        rule="76% or more at the exit of the built-in checkpoint *",
        judge=rules.task_acceptance,
    ),
    Claim(
        experiment="task",
        section="4.1",
        needs=("recipe", "control"),
        paper="The recipe costs the last layer 3.0 points of exact match: 82.9 against 85.9",
        rule="the last layer is at most 3.0 points below the control's",
        judge=rules.cost_of_the_recipe,
    ),
    Claim(
        experiment="task",
        section="4.2",
        needs=("late exit",),
        paper="Early exit at E = 18 of 24 is as good as the last layer: 83.3 and 82.9",
        rule="exact match at most one point below the last layer's, at the trained exit nearest 3L/4 *",
        judge=rules.early_exact_match,
    ),
    Claim(
        experiment="kvq",
        section="4.3",
        paper="Reusing the KV cache saves 5 to 11% of the time per token",
        rule="5% or more at every pair (E, d), with the tokens of plain decoding",
        judge=rules.saved,
    ),
    Claim(
        experiment="speculation",
        section="4.3",
        paper="Pretrained from scratch, self-speculative decoding is 2.16x faster (CNN/DM)",
        rule="2.16x or more at some (E, d) of a checkpoint trained from scratch",
        judge=rules.from_scratch,
    ),
    Claim(
        experiment="speculation",
        section="4.3",
        paper="Drafts are long: the paper's have 4 to 12 tokens",
        rule="the fastest d is 4 to 12 for every checkpoint that gains from drafts *",
        judge=rules.long_drafts,
        spread=_SPREAD_OF_SPEEDS,
    ),
    Claim(
        experiment="speculation",
        section="4.3",
        paper="Self-speculative decoding returns the tokens of the full model",
        rule="greedy tokens equal those of plain decoding in all settings",
        judge=rules.lossless,
    ),
)
