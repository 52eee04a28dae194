"""Likelihoods of passages at all exits, and measures of answers: exact match, ROUGE, pass@1."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from layerskip.bench.sandbox import check_allowed, runs_to_end
from layerskip.decoding import iter_exit_hidden_states
from layerskip.decoding.prefix_cache import same_rope_scaling
from layerskip.decoding.prompt import Prompt
from layerskip.model import NON_FINITE_MESSAGE, Decoder, native

Progress = Callable[[str, int, int], None]  # name of a phase, steps done, and in all
HEAD_CHUNK = 256  # positions a product with the head: bounds the memory of logits


@dataclasses.dataclass(frozen=True)
class Passage:
    """Tokens, of which the last `scored` are to be predicted, each from all those before it."""

    tokens: tuple[int, ...]
    scored: int

    def __post_init__(self) -> None:
        assert 0 <= self.scored < max(len(self.tokens), 1), "the first token follows nothing"


@dataclasses.dataclass(frozen=True)
class Score:
    """Likelihood of a passage at one exit.

    Attributes:
        log_likelihood: sum over the scored tokens, in nats.
        hits: number of scored tokens that are the exit's most likely ones.
    """

    log_likelihood: float = 0.0
    hits: int = 0


@torch.inference_mode()
def score_passages(
    decoder: Decoder,
    passages: Sequence[Passage],
    exits: Collection[int],
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[int, Score]]:
    """Score passages at all exits, in batches of similar length.

    Passages that differ only in their last token, such as letters of a multiple-choice question, are one
    row of a batch.

    Args:
        decoder: the model.
        passages: at most one token longer than the context.
        exits: layers run, each 1 to L.
        batch_size: rows a batch.
        progress: called after every batch with the number of passages done, and in all.

    Returns:
        For every passage: exit -> score.

    Raises:
        ValueError: a likelihood is NaN.
    """
    scores = [{e: Score() for e in exits} for _ in passages]
    same_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, passage in enumerate(passages):
        if passage.scored:
            same_input[passage.tokens[:-1]].append(i)
    # The largest first, so that a lack of memory shows at once.
    rows = sorted(same_input, key=len, reverse=True)
    n_scored = len(passages) - sum(map(len, same_input.values()))
    for batch in _batches(decoder, rows, batch_size):
        members = [same_input[row] for row in batch]
        batch_scores = _score_batch(
            decoder, batch, [[passages[i] for i in some] for some in members], exits
        )
        for i, score in zip((i for some in members for i in some), batch_scores, strict=True):
            scores[i] = score
            n_scored += 1
        if progress is not None:
            progress(n_scored, len(passages))
    return scores


def _batches(
    decoder: Decoder, rows: Sequence[tuple[int, ...]], batch_size: int
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Yield batches of rows that have the same rotary embedding as each row alone.

    They share a cache as wide as the longest, on which a rotary embedding may depend (LongRoPE).
    """
    first = 0
    for end in range(1, len(rows) + 1):
        sizes = [len(row) for row in rows[first : end + 1]]
        if len(sizes) > batch_size or end == len(rows) or not same_rope_scaling(decoder, *sizes):
            yield rows[first:end]
            first = end


def _score_batch(
    decoder: Decoder,
    inputs: Sequence[tuple[int, ...]],
    members: Sequence[Sequence[Passage]],
    exits: Collection[int],
) -> list[dict[int, Score]]:
    """Return the scores of all members; `members[b]` are the passages that share the row inputs[b]."""
    width = max(map(len, inputs))
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in inputs])
    targets = [  # row, position, the token that follows there
        (b, len(inputs[b]) - passage.scored + i, token)
        for b, some in enumerate(members)
        for passage in some
        for i, token in enumerate(passage.tokens[len(passage.tokens) - passage.scored :])
    ]
    sizes = torch.tensor([passage.scored for some in members for passage in some])
    owner = torch.arange(len(sizes)).repeat_interleave(sizes)
    row, position, target = (column.to(decoder.device) for column in torch.tensor(targets).T)
    nats = {e: torch.zeros(len(targets)) for e in exits}
    hits = {e: torch.zeros(len(targets), dtype=torch.bool) for e in exits}
    for start, e, hidden in iter_exit_hidden_states(decoder, tokens.to(decoder.device), exits):
        inside = (position >= start) & (position < start + hidden.shape[1])
        for some in inside.nonzero()[:, 0].split(HEAD_CHUNK):
            states = hidden[row[some], position[some] - start]
            nll, hit = _compare(decoder, states, target[some])
            if bool(nll.isnan().any()):
                raise ValueError(f"at exit {e} {NON_FINITE_MESSAGE}")
            nats[e][some.cpu()], hits[e][some.cpu()] = nll.cpu(), hit.cpu()

    def totals(per_token: Tensor) -> list[float]:
        sums = torch.zeros(len(sizes), dtype=torch.float64)
        return sums.index_add_(0, owner, per_token.double()).tolist()

    by_exit = {e: zip(totals(nats[e]), totals(hits[e]), strict=True) for e in exits}
    columns = {e: [Score(-nll, int(hit)) for nll, hit in pairs] for e, pairs in by_exit.items()}
    return [{e: columns[e][k] for e in exits} for k in range(len(sizes))]


def _compare(decoder: Decoder, states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return negative log-likelihoods of targets [n] after states [n, D], and if each is the argmax."""
    logits = decoder.logits(states[None])[0].float()
    return F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt.

    Attributes:
        id: of the data set, or file and line ("mine.jsonl:3").
        prompt: as for `LayerSkipModel.tokenize`: a text, or a conversation.
        references: right answers.
        category: of the data set, for results by category.
        prediction: a text that much of the answer is predicted to be, or None.
        fields: the data set's row, for scoring (the tests of HumanEval, ...).
    """

    id: str
    prompt: Prompt
    references: tuple[str, ...] = ()
    category: str | None = None
    prediction: str | None = None
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Metrics = Callable[[Sequence[Sample], Sequence[str]], dict[str, float]]

_ROUGE = ("rouge1", "rouge2", "rougeL")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def check_can_judge(metrics: Metrics | None, *, allow_code_execution: bool = False) -> None:
    """Check that answers can be judged, before they are generated.

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
    """Return the share of answers that equal a reference, without space at the ends."""
    hits = [
        text.strip() in {reference.strip() for reference in sample.references}
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {"exact_match": fmean(hits)}


def final_number(text: str) -> Decimal | None:
    """Return the number after the last `####`, as in GSM8K; without that mark, the last number."""
    _, mark, marked = text.rpartition("####")
    numbers = _NUMBER.findall(marked)
    if not numbers:
        return None
    return Decimal(numbers[0 if mark else -1].replace(",", ""))


def number_match(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Return the share of answers whose final number equals a reference's."""
    hits = [
        (number := final_number(text)) is not None
        and number in {final_number(reference) for reference in sample.references}
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {"exact_match": fmean(hits)}


def rouge(
    samples: Sequence[Sample], texts: Sequence[str], tokenizer: Any = None
) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L by `rouge-score`, without stemming.

    Of several references the one with the best F1 counts, for each measure. Without a tokenizer, words
    are those of published figures: letters a to z and digits.
    """
    scorer = rouge_scorer(tokenizer)
    scores = [
        scorer.score_multi(list(sample.references), text)
        for sample, text in zip(samples, texts, strict=True)
    ]
    return {name: fmean(score[name].fmeasure for score in scores) for name in _ROUGE}


def first_line_rouge(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Return the ROUGE of the first line that is not empty."""
    return rouge(samples, [text.strip().partition("\n")[0] for text in texts])


class _Words:
    """Tokenizer of words of any script for `rouge-score`; single characters of Chinese and Japanese."""

    _CHARACTER = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    _WORD = re.compile(rf"[{_CHARACTER}]|[^\W_{_CHARACTER}]+")

    def tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(text.lower())


def rouge_scorer(tokenizer: Any = None) -> Any:
    """Return the scorer of `rouge-score`.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ValueError("ROUGE needs `rouge-score`: pip install 'layerskip[bench]'") from None
    return RougeScorer(_ROUGE, tokenizer=tokenizer)


def match_and_rouge(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    """Return exact match and ROUGE, for references of an unknown kind and language."""
    return exact_match(samples, texts) | rouge(samples, texts, _Words())


def pass_at_1(
    samples: Sequence[Sample], texts: Sequence[str], *, allow_code_execution: bool = False
) -> dict[str, float]:
    """Return the share of problems whose tests pass, one answer each (Chen et al. 2021, n = k = 1).

    Args:
        samples: their fields are those of HumanEval or MBPP.
        texts: one answer a sample.
        allow_code_execution: the user's consent to run the answers, in `sandbox.runs_to_end`.

    Raises:
        ValueError: it is not allowed.
    """
    check_allowed(allow_code_execution)
    programs = [program(sample, text) for sample, text in zip(samples, texts, strict=True)]
    with ThreadPoolExecutor(native.num_threads_to_use()) as pool:
        return {"pass@1": fmean(pool.map(_passes, programs))}


@functools.lru_cache(maxsize=8192)
def _passes(program: str) -> bool:
    """Run a program; equal answers of several modes are judged once."""
    return runs_to_end(program, allow_code_execution=True)  # `pass_at_1` has checked


def program(sample: Sample, text: str) -> str:
    """Return an answer followed by the tests of its problem."""
    row = sample.fields
    if "entry_point" in row:  # HumanEval: the answer goes on with the prompt
        return f"{sample.prompt}{text}\n{row['test']}\ncheck({row['entry_point']})\n"
    return "\n".join([text, row["test_setup_code"], *row["test_list"], ""])
