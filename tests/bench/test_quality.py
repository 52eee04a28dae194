"""Metrics against numbers counted by hand."""

import shutil
from decimal import Decimal

import pytest

from layerskip.bench import quality, sandbox
from layerskip.bench.tasks import Sample


def samples(*references):
    return [
        Sample(id=str(i), prompt="p", references=(r,) if isinstance(r, str) else r)
        for i, r in enumerate(references)
    ]


def test_exact_match_is_exact():
    asked = samples("[IN:A x ]", "[IN:B ]", "[IN:C ]", ("one", "two"))
    answers = [" [IN:A x ]\n", "[IN:b ]", "[IN:C ] ]", "two"]
    assert quality.exact_match(asked, answers) == {"exact_match": 2 / 4}


def test_final_number():
    for text, number in (
        ("5 + 6 = 11\n#### 11", 11),
        ("#### 1,234", 1234),
        ("#### $-3.50 each, 4 of them", Decimal("-3.5")),
        ("First 12, so the answer is 72.", 72),
        ("it is .5", Decimal("0.5")),
        ("none", None),
        ("", None),
        ("7 ####", None),
    ):
        assert quality.final_number(text) == number


def test_numbers_match_by_value():
    asked = samples("so\n#### 72", "#### 1,000", "#### 5", "#### 3")
    answers = ["... #### 72.0", "That makes 1000 in all.", "#### 6 or 5", "no idea"]
    assert quality.number_match(asked, answers) == {"exact_match": 2 / 4}


def test_rouge_of_hand_counted_words():
    # Reference of 4 words, answer of 2 of them: precision 1, recall 1/2. Bigrams: 1 of 1, 1 of 3.
    found = quality.rouge(samples("the cat sat down"), ["cat sat"])
    assert found["rouge1"] == pytest.approx(2 / 3)
    assert found["rouge2"] == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert found["rougeL"] == pytest.approx(2 / 3)
    # Words in another order: all unigrams, no bigram, a common subsequence of one word.
    assert quality.rouge(samples("a b"), ["b a"]) == {"rouge1": 1, "rouge2": 0, "rougeL": 0.5}
    # The better reference counts; the mean is over samples.
    assert quality.rouge(samples(("x", "a b"), "c"), ["a b", "d"])["rouge2"] == 0.5


def test_rouge_of_other_scripts():
    perfect = {"exact_match": 1, "rouge1": 1, "rouge2": 1, "rougeL": 1}
    for text in ("Столица Франции", "東京は首都", "Größe und Maß", "the cat_sat 2"):
        assert quality.match_and_rouge(samples(text), [text]) == perfect
    assert quality.match_and_rouge(samples("Привет 7"), ["Совсем 7"])["rouge1"] == 0.5
    assert quality.match_and_rouge(samples("東京 a"), ["東西 a"])["rouge1"] == pytest.approx(2 / 3)


def test_first_line_is_the_summary():
    perfect = {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert quality.first_line_rouge(samples("a b"), ["\n a b\nand more"]) == perfect


def problem(**row):
    return Sample(id="x", prompt=row.get("prompt", ""), fields=row)


def test_where_no_program_can_run_that_is_said_and_not_called_0(monkeypatch):
    quality.check_can_judge(quality.pass_at_1, allow_code_execution=True)
    monkeypatch.setattr(sandbox.sys, "executable", shutil.which("false"))
    with pytest.raises(ValueError, match="does not start here"):
        quality.check_can_judge(quality.pass_at_1, allow_code_execution=True)


def test_pass_at_1_of_humaneval_and_mbpp():
    test = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(3) == 9"
    asked = problem(prompt="def square(x):", entry_point="square", test=test)
    answers = ["\n    return x * x", "\n    return x + x", "\n    exit(0)", ""]
    assert quality.pass_at_1([asked] * 4, answers, allow_code_execution=True) == {"pass@1": 1 / 4}
    asked = problem(test_setup_code="n = 3", test_list=["assert f(n) == 4", "assert f(0) == 1"])
    answers = ["def f(x):\n    return x + 1", "def f(x):\n    return 4"]
    assert quality.pass_at_1([asked] * 2, answers, allow_code_execution=True) == {"pass@1": 1 / 2}
