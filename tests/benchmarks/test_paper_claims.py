"""The paper's claims are judged by their rules, and the page says what the files say."""

import copy
import json
import math
import re

import pytest
from paper.claims import (
    CLAIMS,
    NOT_MEASURED,
    NOT_SEEN,
    SEEN,
    SPREAD,
    SPREAD_AT_EXITS,
    verdict,
)
from paper.page import LONG, PAGE, REPEAT, TITLES, page, read, written
from paper.record import RESULTS
from paper.rules import perplexities
from paper.task import BUILT_IN

HERE = {"command": "python -m paper.x", "commit": "abc", "date": "2026-11-25", "cpu": "a CPU"}
HERE |= {"cpu_capability": "AVX2", "threads": 2, "dtype": "bfloat16"}
LEARNT = {"steps": 5, "rows": 40, "tokens": 12_345, "regime": "pretrain"}


def row(variant, **figures):
    return {
        "variant": variant,
        "model": "m",
        "layers": 12,
        "trained": LEARNT,
        "environment": HERE,
        **figures,
    }


def exits(early, last):
    values = {3: early, 6: early, 9: early, 12: last}
    return [{"exit_layer": e, "token_perplexity": value} for e, value in values.items()]


def drafts(speed, *, acceptance=0.8, identical=1.0, best=6):
    lengths = [{"draft_tokens": d, "acceptance_rate": acceptance} for d in (1, best, 12)]
    timed = [
        {
            "exit_layer": e,
            "draft_tokens": d,
            "speedup": speed / (1 + e / 10) - abs(d - best) / 100,
            "speedup_interval": [1.0, 2.0],
            "identical_to_plain": identical,
        }
        for e in (3, 6, 9)
        for d in (1, best, 12)
    ]
    by_exit = [
        {"exit_layer": e, "agreement": 0.9, "by_draft_tokens": lengths} for e in (2, 3, 6, 9)
    ]
    return {
        "task": "humaneval",
        "samples": 3,
        "max_new_tokens": 8,
        "plain": {"new_tokens": 24, "quality": {"pass@1": 0.5}},
        "exits": by_exit,
        "timed": timed,
    }


def topv2(acceptance, early, speeds):
    found = [
        {
            "exit_layer": e,
            "exact_match": early,
            "agreement": 0.9,
            "acceptance_rate": acceptance,
            "mean_accepted_length": 4.0,
        }
        for e in (3, 6, 9)
    ]
    timed = [
        {"exit_layer": e, "draft_tokens": 8, "speedup": speed, "speedup_interval": [1.0, 2.0]}
        for e, speed in zip((3, 6, 9), speeds, strict=True)
    ]
    return {"draft_tokens": 8, "exits": found, "timed": timed}


def kvq(saved, identical=1.0):
    return {
        "task": "topv2",
        "ms_per_token": {"with": 1.0, "without": 2.0},
        "ms_per_token_of_repeats": {"with": [1 - saved, 9.0, 1.0], "without": [1.0, 9.0, 2.0]},
        "identical_to_plain": {"with": 1.0, "without": identical},
    }


def as_in_the_paper():
    others = ("LD", "EE", "LD+EE uniform over layers", "LD+EE constant over steps")
    return {
        "pretrain": [
            row("baseline", exits=exits(None, 20.0)),
            row("LD+EE", exits=exits(30.0, 20.3)),
            *(row(name, exits=exits(50.0, 21.0)) for name in others),
            row("LD+EE gradual", exits=exits(30.0, 21.0)),
            row("LD+EE all exits", exits=exits(30.0, 21.0)),
        ],
        "continual": [
            row("before", text=exits(900.0, 20.0), code=exits(900.0, 20.0)),
            row("recipe", text=exits(30.0, 20.9), code=exits(30.0, 20.9)),
            row("control", text=exits(900.0, 20.0), code=exits(900.0, 20.0)),
        ],
        "domain": [
            row("before", **drafts(1.0)),
            row("control", **drafts(1.1)),
            row("recipe", **drafts(2.6)),
        ],
        "task": [
            *(
                row(name, exact_match=0.83, **topv2(0.77, 0.83, (2.0, 1.6, 1.2)))
                for name in ("recipe", BUILT_IN, "late exit")
            ),
            row("control", exact_match=0.85),
        ],
        "kvq": [row("E = 3, d = 8", **kvq(0.06)), row("E = 6, d = 8", **kvq(0.11))],
        "speculation": [row("a on b", **drafts(2.9))],
    }


def otherwise():
    return {
        "pretrain": [
            row("baseline", exits=exits(30.0, 20.0)),
            row("LD+EE", exits=exits(60.0, 20.5)),
            row("LD", exits=exits(50.0, 20.0)),
            row("EE", exits=exits(70.0, 20.0)),
            *(
                row(name, exits=exits(30.0, 20.6))
                for name in ("LD+EE uniform over layers", "LD+EE constant over steps")
            ),
            *(row(f"LD+EE {name}", exits=exits(30.0, 20.0)) for name in ("gradual", "all exits")),
        ],
        "continual": [
            row("before", text=exits(30.0, 20.0), code=exits(30.0, 20.0)),
            row("recipe", text=exits(30.0, 21.1), code=exits(30.0, 20.0)),
            row("control", text=exits(30.0, 20.0), code=exits(30.0, 20.0)),
        ],
        "domain": [
            row("before", **drafts(1.0)),
            row("control", **drafts(1.5)),
            row("recipe", **drafts(1.5, acceptance=0.44)),
        ],
        "task": [
            *(
                row(name, exact_match=0.83, **topv2(0.75, 0.81, (1.2, 1.6, 1.9)))
                for name in ("recipe", BUILT_IN, "late exit")
            ),
            row("control", exact_match=0.87),
        ],
        "kvq": [row("E = 3, d = 8", **kvq(0.06)), row("E = 6, d = 8", **kvq(-0.01))],
        "speculation": [row("a on b", **drafts(2.0, identical=0.9, best=2))],
    }


@pytest.mark.parametrize(
    ("experiments", "wanted"),
    [(as_in_the_paper(), SEEN), (otherwise(), NOT_SEEN), ({}, NOT_MEASURED)],
    ids=["as in the paper", "otherwise", "no files"],
)
def test_every_rule_can_hold_and_fail(experiments, wanted):
    for claim in CLAIMS:
        finding = claim.finding(experiments.get(claim.experiment, ()))
        assert verdict(finding) == wanted, (claim.paper, finding)


def test_a_claim_needs_all_its_variants():
    rows = [row for row in as_in_the_paper()["pretrain"] if row["variant"] != "baseline"]
    needing = [claim for claim in CLAIMS if "baseline" in claim.needs]
    assert needing
    assert {verdict(claim.finding(rows)) for claim in needing} == {NOT_MEASURED}


def test_rows_that_differ_in_more_than_the_variant_are_not_compared():
    for differs in ({"trained": LEARNT | {"rows": 48}}, {"corpus": {"files": 2}}):
        first, *others = as_in_the_paper()["pretrain"]
        needing = [claim for claim in CLAIMS if "baseline" in claim.needs]
        assert {verdict(c.finding([{**first, **differs}, *others])) for c in needing} == {
            NOT_MEASURED
        }


def test_exits_without_a_loss_say_nothing_of_the_recipe():
    recipe, built_in, late, control = as_in_the_paper()["task"]
    for one in (*recipe["timed"], *late["exits"]):
        if one["exit_layer"] == 9:
            one |= {"exact_match": 0.0, "speedup": 1.9}
    learnt = {"trained": LEARNT | {"recipe": {"fixed_exits": [6], "exits": [3, 6]}}}
    rows = [recipe | learnt, built_in, late | learnt, control]
    claims = {claim.rule: claim.finding(rows) for claim in CLAIMS if claim.experiment == "task"}
    (trend,) = [rule for rule in claims if "falls from exit to exit" in rule]
    assert claims.pop(trend) is None  # two exits make no trend
    assert all(finding.holds for finding in claims.values())
    assert "E = 9" not in " ".join(finding.figures for finding in claims.values())


def test_what_a_text_of_the_same_kind_gives_the_code_may_take():
    before, recipe, control = as_in_the_paper()["continual"]
    worse = {**recipe, "code": exits(30.0, 22.0)}
    found = [c.finding([before, worse, control]) for c in CLAIMS if c.experiment == "continual"]
    assert [finding.holds for finding in found] == [True, False, False]


def test_reuse_of_the_cache_counts_only_with_the_same_tokens():
    rows = [row("E = 3, d = 8", **kvq(0.08, identical=0.9))]
    (claim,) = [claim for claim in CLAIMS if claim.experiment == "kvq"]
    assert verdict(claim.finding(rows)) == NOT_SEEN


def test_the_page_has_the_figures_and_their_origin():
    text = page(as_in_the_paper())
    assert NOT_MEASURED not in text
    assert "|20.30 against 20.00 (+1.5%)|" in text
    assert "|m; a CPU (AVX2); 2026-11-25|`kvq.json`|" in text
    assert "`benchmarks/results/paper/kvq.json`" in text
    changed = copy.deepcopy(as_in_the_paper())
    changed["kvq"][0] |= kvq(math.pi / 100)
    assert "3.1%" in page(changed)


def test_the_page_begins_with_the_tally():
    def tally(experiments):
        return " ".join(page(experiments).split("\n\n")[1].split()).split(" were not seen")[0]

    n = len(CLAIMS)
    assert tally(otherwise()).endswith(f"0 were seen again, 0 perhaps by chance, and {n}")
    assert re.search(
        r"\d+ were seen again, [1-9] perhaps by chance, and 0$", tally(as_in_the_paper())
    )


def test_a_second_training_is_compared_with_the_first():
    experiments = as_in_the_paper()
    text = page(experiments, {REPEAT: [row("baseline", exits=exits(33.0, 21.0))]})
    assert "baseline, E = 12: 21.00 against 20.00 (+5.0%)" in text


def test_gaps_count_from_the_largest_of_the_second_training():
    first = {row["variant"]: perplexities(row["exits"]) for row in read(RESULTS)["pretrain"]}
    again = {r["variant"]: perplexities(r["exits"]) for r in read(RESULTS, (REPEAT,))[REPEAT]}
    largest = [max(abs(again[v][e] / first[v][e] - 1) for v in again) for e in (12, 6)]
    assert [round(gap, 3) for gap in largest] == [SPREAD, SPREAD_AT_EXITS]


def test_the_longer_training_is_described():
    corpus = {"sources": ["stdlib", "sympy"]}
    text = page(as_in_the_paper(), {LONG: [row("LD+EE", exits=exits(33.0, 21.0), corpus=corpus)]})
    assert "5 steps on stdlib, sympy" in text
    assert "33.00 at E = 6" in text
    assert "21.00 at E = 12" in text


def test_files_of_smoke_runs_are_no_results(tmp_path):
    for smoke in (True, False):
        for name, rows in as_in_the_paper().items():
            text = json.dumps({"smoke": smoke, "rows": rows})
            (tmp_path / f"{name}.json").write_text(text)
        assert list(read(tmp_path)) == ([] if smoke else list(TITLES))


def test_the_page_is_what_the_files_give():
    again = "PYTHONPATH=benchmarks python -m paper.page"
    assert PAGE.read_text(encoding="utf-8") == written(RESULTS), f"write it again: {again}"


def test_a_gap_that_the_same_training_has_had_may_be_chance():
    rows = as_in_the_paper()["pretrain"]
    for claim in CLAIMS:
        if "LD+EE gradual" in claim.needs:  # 20.3 against 21.0
            assert verdict(claim.finding(rows), claim.spread) == "seen again, perhaps by chance"
        elif claim.needs == ("LD+EE", "LD", "EE"):  # 30 against 50
            assert verdict(claim.finding(rows), claim.spread) == SEEN


def test_drafts_that_are_hardly_faster_may_be_so_by_chance():
    (claim,) = [claim for claim in CLAIMS if claim.paper.startswith("Drafts are long")]
    for best, said in ((6, "seen again, perhaps by chance"), (12, SEEN), (1, NOT_SEEN)):
        finding = claim.finding([row("tuned", **drafts(1.4, best=best))])
        assert verdict(finding, claim.spread) == said, best
