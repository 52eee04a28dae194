"""How good answers are: exact match, the final number, ROUGE, pass@1. All from 0 to 1."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from statistics import fmean
from typing import TYPE_CHECKING, Any

from layerskip.bench.sandbox import check_allowed, runs_to_end
from layerskip.model import native

if TYPE_CHECKING:
    from layerskip.bench.tasks import Sample

Metrics = Callable[[Sequence["Sample"], Sequence[str]], dict[str, float]]

_ROUGE = ("rouge1", "rouge2", "rougeL")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def check_can_judge(metrics: Metrics | None, *, allow_code_execution: bool = False) -> None:
    """Check that answers can be judged, before an hour of measuring and not after it.

    Raises:
        ValueError: a package is not installed, or generated code is not allowed or cannot run here.
    """
    if metrics in (rouge, first_line_rouge, match_and_rouge):
        rouge_scorer()
    if metrics is pass_at_1 and not runs_to_end(
        "import datetime, random, threading", allow_code_execution=allow_code_execution
    ):
        raise ValueError(
            "pass@1 cannot be judged: a limited Python process does not start here"
            " (are memory or processes limited?)"
        )


def exact_match(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Share of answers that are a reference, character by character but for space at the ends."""
    hits = [
        text.strip() in {reference.strip() for reference in sample.references}
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {"exact_match": fmean(hits)}


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, the form of GSM8K; without that mark, the last number."""
    _, mark, marked = text.rpartition("####")
    numbers = _NUMBER.findall(marked)
    if not numbers:
        return None
    return Decimal(numbers[0 if mark else -1].replace(",", ""))


def number_match(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Share of answers whose final number equals a reference's."""
    hits = [
        (number := final_number(text)) is not None
        and number in {final_number(reference) for reference in sample.references}
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {"exact_match": fmean(hits)}


def rouge(
    samples: Sequence[Sample], texts: Sequence[str], tokenizer: Any = None
) -> dict[str, float]:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L by `rouge-score`, without stemming.

    Of several references the one with the best F1 counts, each measure by itself. Without a
    tokenizer words are those of published figures: of the letters a to z and digits.
    """
    scorer = rouge_scorer(tokenizer)
    scores = [
        scorer.score_multi(list(sample.references), text)
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {name: fmean(score[name].fmeasure for score in scores) for name in _ROUGE}


def first_line_rouge(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """ROUGE of the first line that is not empty: the sentence that was asked for."""
    return rouge(samples, [text.strip().partition("\n")[0] for text in texts])


class _Words:
    """Words of any script for `rouge-score`; Chinese and Japanese by the character."""

    _CHARACTER = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    _WORD = re.compile(rf"[{_CHARACTER}]|[^\W_{_CHARACTER}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(text.lower())


def rouge_scorer(tokenizer: Any = None) -> Any:
    """The scorer of `rouge-score`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs `rouge-score`: pip install 'layerskip[bench]'") from None
    return RougeScorer(_ROUGE, tokenizer=tokenizer)


def match_and_rouge(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Exact match and ROUGE, for references of an unknown kind and language."""
    return exact_match(samples, texts) | rouge(samples, texts, _Words())


def pass_at_1(
    samples: Sequence[Sample], texts: Sequence[str], *, allow_code_execution: bool = False
) -> dict[str, float]:
    """Share of problems whose tests pass, one answer each (Chen et al. 2021, n = k = 1).

    Args:
        samples: their fields are those of HumanEval or MBPP.
        texts: one answer a sample.
        allow_code_execution: the user's consent to run the answers, in `sandbox.runs_to_end`.

    Raises:
        ValueError: it is not allowed.
    """
    check_allowed(allow_code_execution)
    programs = [program(sample, text) for sample, text in zip(samples, texts, strict=True)]
    with ThreadPoolExecutor(native.usable()) as pool:
        return {"pass@1": fmean(pool.map(_passes, programs))}


@functools.lru_cache(maxsize=8192)
def _passes(program: str) -> bool:
    """Modes that answer alike are judged once, and alike."""
    return runs_to_end(program, allow_code_execution=True)  # `pass_at_1` has checked


def program(sample: Sample, text: str) -> str:
    """An answer with the tests of its problem after it."""
    row = sample.fields
    if "entry_point" in row:  # HumanEval: the answer goes on with the prompt
        return f"{sample.prompt}{text}\n{row['test']}\ncheck({row['entry_point']})\n"
    return "\n".join([text, row["test_setup_code"], *row["test_list"], ""])
