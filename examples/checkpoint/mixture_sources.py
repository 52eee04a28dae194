"""Sources of the mixture: the licence of each data set, and the conversion of its rows.

Rows to train on have `prompt` and `completion`, or `messages`, or `text`; rows held back have `prompt`
and `reference`. Prompts and completions are tokenized apart and put together, so a prompt ends where the
tokenizer would cut anyway: completions begin with a space or a line break, or follow a line break.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from layerskip.bench.tasks import FORMS
from layerskip.data.readers import DataSet

Rows = list[dict[str, Any]]
# Prompt and completion together: 300 tokens at 3.2 characters, which even code rarely falls below.
MOST_CHARACTERS = 960
MOST_OF_NUMBERS = 560  # where many are digits, each a token of its own
OPENING = 200  # characters; texts that begin alike are taken for the same
HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Source:
    """A data set and how it is read.

    Attributes:
        data: what it is, for people.
        licence: of the data.
        read: folder of data sets (None: $LAYERSKIP_DATA) -> rows to train on, rows held back.
        running: whether every second row to train on is `running_text`.
    """

    data: str
    licence: str
    read: Callable[[str | None], tuple[Rows, Rows]]
    running: bool = False


def opening(row: dict[str, Any]) -> str:
    """Return the beginning of a row; rows with equal beginnings stay on one side of the split."""
    text = row.get("prompt") or row.get("text") or row["messages"][0]["content"]
    return str(text[:OPENING])


def is_held_out(key: str) -> bool:
    """Return True for one key in twenty, whose rows are held out."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def fits(row: dict[str, Any], characters: int = MOST_CHARACTERS) -> bool:
    """Return True if a row with prompt and completion is short enough."""
    return len(row["prompt"]) + len(row["completion"]) <= characters


def as_question(row: dict[str, Any]) -> dict[str, Any]:
    """A row to train on as one that is held back."""
    rest = {name: value for name, value in row.items() if name != "completion"}
    return {**rest, "reference": row["completion"].strip()}


def summary_prompt(text: str) -> str:
    """The prompt of all summaries; the summary follows after a space."""
    return f"{text.strip()}\n\nSummary:"


def running_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row as one text, prompt and completion, of which every token is learnt.

    A short completion says little about prose and code. The prompt before it costs as much to compute,
    and more text is what early exits of a small budget lack.
    """
    rest = {name: value for name, value in row.items() if name not in ("prompt", "completion")}
    return {**rest, "text": row["prompt"] + row["completion"]}


def _topv2(data: str | None) -> tuple[Rows, Rows]:
    form = FORMS["topv2"]

    def rows(split: str, answer: str) -> Rows:
        return [
            {"prompt": form.prompt(row), answer: row["semantic_parse"], "category": row["domain"]}
            for row in form.data.rows(split, data)
        ]

    return rows("train", "completion"), rows("test", "reference")


_DEBIAN = DataSet(
    folder="debian_descriptions",
    files={"train": "descriptions.jsonl*"},
    origin="https://deb.debian.org/debian/dists/trixie/main/i18n/Translation-en",
)


def _debian(data: str | None) -> tuple[Rows, Rows]:
    """One package of those whose descriptions begin alike (a program, its data, its documentation)."""
    kept: dict[str, dict[str, Any]] = {}
    for source in _DEBIAN.rows("train", data):
        prompt = summary_prompt(unwrapped(source["description"]))
        row = {"prompt": prompt, "completion": f" {source['summary'].strip()}"}
        if fits(row):
            kept.setdefault(opening(row), row)
    train = [row for key, row in kept.items() if not is_held_out(key)]
    return train, [as_question(row) for key, row in kept.items() if is_held_out(key)]


def unwrapped(text: str) -> str:
    """Join the lines of each paragraph; lists, which are set off by a mark or a space, keep theirs."""
    return re.sub(r"(?<=\S)[ \t]*\n(?![\s*•+-]|\d+[.)])", " ", text)


_SCITLDR = DataSet(
    folder="scitldr",
    files={"train": "train.jsonl*", "test": "test.jsonl*"},
    hub="allenai/scitldr",
    config="Abstract",
    origin="https://github.com/allenai/scitldr",
)


def _scitldr(data: str | None) -> tuple[Rows, Rows]:
    """Abstracts, up to the sentence that still fits, and the first summary of each."""

    def rows(split: str) -> Rows:
        found = []
        for source in _SCITLDR.rows(split, data):
            summary = _tidy(source["target"][0])
            sentences = [_tidy(sentence) for sentence in source["source"]]
            abstract = _that_fit(
                sentences, MOST_CHARACTERS - len(summary) - len(summary_prompt(" "))
            )
            if abstract:
                found.append({"prompt": summary_prompt(abstract), "completion": f" {summary}"})
        return found

    return rows("train"), [as_question(row) for row in rows("test")]


def _that_fit(sentences: Iterable[str], characters: int) -> str:
    text = ""
    for sentence in sentences:
        longer = f"{text} {sentence}".strip()
        if len(longer) > characters:
            break
        text = longer
    return text


def _tidy(text: str) -> str:
    return " ".join(text.split())


_MBPP = DataSet(
    folder="mbpp",
    files={"train": "mbpp.jsonl*"},
    hub="google-research-datasets/mbpp",
    config="full",
    origin="https://github.com/google-research/google-research/tree/master/mbpp",
    ids={"train": range(601, 975)},
)


def _mbpp(data: str | None) -> tuple[Rows, Rows]:
    """In the form of the benchmark without examples; the end of the text ends a program."""
    form = FORMS["mbpp"]
    assert form.answer is not None
    train = []
    for source in _MBPP.rows("train", data):
        program, _, _ = form.answer(source).partition("\n[DONE]")
        code = "\n".join(line.rstrip() for line in program.expandtabs(4).split("\n"))
        train.append({"prompt": form.prompt(source), "completion": code})
    return [row for row in train if fits(row, MOST_OF_NUMBERS)], []


def _gsm8k(data: str | None) -> tuple[Rows, Rows]:
    """As conversations, without the marks for a calculator."""
    train = []
    for source in FORMS["gsm8k"].data.rows("train", data):
        steps, _, number = re.sub(r"<<[^>]*>>", "", source["answer"]).partition("\n#### ")
        asked = {"role": "user", "content": _tidy(source["question"])}
        answered = {
            "role": "assistant",
            "content": f"{steps.strip()}\nThe answer is {number.strip()}.",
        }
        if len(asked["content"]) + len(answered["content"]) <= MOST_OF_NUMBERS:
            train.append({"messages": [asked, answered]})
    return train, []


_WIKITEXT = DataSet(
    folder="wikitext2",
    files={"validation": "valid.txt*"},
    hub="Salesforce/wikitext",
    config="wikitext-2-v1",
    origin="https://huggingface.co/datasets/Salesforce/wikitext",
)
_UNKNOWN = "<unk>"
FEWEST_WORDS = 24  # of a passage


def _wikitext(data: str | None) -> tuple[Rows, Rows]:
    """Running text, as people write it, without the sentences that have an unknown word."""
    train = []
    for source in _WIKITEXT.rows("validation", data):
        for line in source["text"].splitlines():
            known = [text for text in sentences_of(line) if _UNKNOWN not in text]
            train += [{"text": text} for text in _passages(known)]
    return train, []


def sentences_of(line: str) -> list[str]:
    """The sentences of a tokenized paragraph, with its spaces as people write them."""
    first, *parts = f" {line.strip()} ".split(' " ')
    marks = (f' "{part}' if number % 2 == 0 else f'" {part}' for number, part in enumerate(parts))
    text = first + "".join(marks)
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r"(?<=\d) ([\u2013:]) (?=\d)", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]]|n't\b|')", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    # A short word before the full stop is rather an abbreviation.
    return re.split(r"(?<=[a-z0-9)\"%]{3}[.!?])\s+(?=[A-Z\"<])", text.strip())


def _passages(sentences: Sequence[str]) -> Iterator[str]:
    """As many sentences together as are short enough, where those are enough words."""
    passage = ""
    for sentence in [*sentences, ""]:
        longer = f"{passage} {sentence}".strip()
        if sentence and len(longer) <= MOST_CHARACTERS:
            passage = longer
            continue
        if len(passage.split()) >= FEWEST_WORDS:
            yield passage
        passage = sentence if len(sentence) <= MOST_CHARACTERS else ""


SOURCES = {
    "topv2": Source("TOPv2 1.1: commands to an assistant and their parses", "CC BY-SA 4.0", _topv2),
    "debian": Source(
        "descriptions and synopses of the packages of Debian 13",
        "each package's own free licence",
        _debian,
        running=True,
    ),
    "scitldr": Source(
        "SciTLDR: abstracts and summaries of one sentence", "Apache-2.0", _scitldr, running=True
    ),
    "mbpp": Source("MBPP, problems 601 to 974: short Python programs", "CC BY 4.0", _mbpp),
    "gsm8k": Source("GSM8K: word problems of school mathematics", "MIT", _gsm8k),
    "wikitext2": Source("WikiText-2, validation part: articles", "CC BY-SA 3.0", _wikitext),
}
