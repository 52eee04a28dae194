"""A task: prompts, where their answers end, and how good answers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

Metrics = Callable[["Sequence[Sample]", Sequence[str]], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt.

    Attributes:
        id: of the data set, or where it stands in a file ("mine.jsonl:3").
        prompt: what `LayerSkipModel.tokenize` takes: a text, or chat messages.
        references: answers to compare with; any of them is right.
        category: of the data set, for results by category.
        fields: the row it was made of, for scoring (the tests of HumanEval, ...).
    """

    id: str
    prompt: str | tuple[Mapping[str, str], ...]
    references: tuple[str, ...] = ()
    category: str | None = None
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, and what is done with the answers.

    Attributes:
        name: as given to `load_task`.
        samples: the prompts, the same for every mode and system that is compared.
        max_new_tokens: tokens an answer may have.
        stop: texts that end an answer.
        metrics: samples and answers -> a value a metric, from 0 to 1; None where nothing says
            which answer is right.
    """

    name: str
    samples: tuple[Sample, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    metrics: Metrics | None = None

    def quality(self, texts: Sequence[str]) -> dict[str, float]:
        """How good the answers are, one text a sample; {} where there are no references."""
        raise NotImplementedError


def load_task(
    name: str,
    *,
    samples: int | None = None,
    n_shot: int | None = None,
    seed: int = 0,
    data: str | None = None,
    chat: bool = True,
) -> Task:
    """The task of a name, or of a file of prompts."""
    raise NotImplementedError
