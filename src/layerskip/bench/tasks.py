"""Tasks: prompts, the ends of their answers, and measures of quality."""

from __future__ import annotations

import contextlib
import functools
import random
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

from layerskip.bench import edits, quality, sandbox
from layerskip.bench.quality import Sample
from layerskip.data.readers import NEEDED, DataSet, DataSetRow, prompt_of

ARTICLE_WORDS = 128  # of an article that is to be continued


class Rows(Protocol):
    """Rows of a task, such as a `DataSet`."""

    def rows(self, split: str, data: str | None = None) -> list[DataSetRow]:
        """Return all rows of a split."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """Definition of a named task.

    Attributes:
        description: one line for lists.
        data: the rows, whose test split has the prompts.
        prompt: row -> prompt, without shots; None skips the row.
        max_new_tokens: maximum length of an answer.
        stop: texts that end an answer.
        answer: row -> the text between the prompt of a shot and the next shot; None where the task
            takes no shots.
        shots: default number.
        shot_split: split that shots are sampled from, never the test split.
        references: row -> right answers.
        metrics: measures of quality, or None.
        category: row -> category; prompts are sampled evenly over them.
        prediction: row -> a text that much of the answer is predicted to be, or None.
        chat: prompts are questions to an assistant: the model's chat template is applied, if any.
    """

    description: str
    data: Rows
    prompt: Callable[[DataSetRow], str | None]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    answer: Callable[[DataSetRow], str] | None = None
    shots: int = 0
    shot_split: str = "train"
    references: Callable[[DataSetRow], tuple[str, ...]] = lambda row: ()
    metrics: quality.Metrics | None = None
    category: Callable[[DataSetRow], str | None] = lambda row: None
    prediction: Callable[[DataSetRow], str | None] = lambda row: None
    chat: bool = False


def _beginning(row: DataSetRow) -> str | None:
    start = re.match(rf"(?:\S+\s+){{{ARTICLE_WORDS - 1}}}\S+(?=\s)", row["article"])
    return start and start.group()


def _mbpp_prompt(row: DataSetRow) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp_answer(row: DataSetRow) -> str:
    code = row["code"].replace("\r\n", "\n").strip()
    return f"{code}\n[DONE]\n\n"


def _first_turn(row: DataSetRow) -> str:
    turns = row["turns"] if "turns" in row else row["prompt"]
    return str(turns[0])


def _spec_bench_category(row: DataSetRow) -> str:
    """Spec-Bench keeps the eight categories of MT-Bench's questions but counts them as one."""
    return row["category"] if row["category"] in _SPEC_BENCH else "mt_bench"


_SPEC_BENCH = ("translation", "summarization", "qa", "math_reasoning", "rag")
_FILES_BY_SPLIT = {split: f"{split}*.jsonl*" for split in ("train", "validation", "test")}
_CNN_DAILYMAIL = DataSet(
    folder="cnn_dailymail",
    files=_FILES_BY_SPLIT,
    hub="abisee/cnn_dailymail",
    config="3.0.0",
    origin="https://huggingface.co/datasets/abisee/cnn_dailymail",
)
_MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511)}

FORMS: Mapping[str, TaskSpec] = {
    "topv2": TaskSpec(
        description="semantic parsing of commands (TOPv2): exact match",
        data=DataSet(
            folder="topv2",
            files={"train": "*_train.tsv*", "validation": "*_eval.tsv*", "test": "*_test.tsv*"},
            origin="https://fb.me/TOPv2Dataset",
        ),
        prompt=lambda row: f"{row['utterance']}\n",
        answer=lambda row: f"{row['semantic_parse']}\n",
        max_new_tokens=128,
        stop=("\n",),
        references=lambda row: (row["semantic_parse"],),
        metrics=quality.exact_match,
        category=lambda row: str(row["domain"]),
    ),
    "humaneval": TaskSpec(
        description="Python functions from their docstrings (HumanEval): pass@1",
        data=DataSet(
            folder="humaneval",
            files={"test": "HumanEval.jsonl*"},
            hub="openai/openai_humaneval",
            origin="https://github.com/openai/human-eval",
        ),
        # Tokenizers take a line break and the indentation after it as one token, which a prompt
        # that ends in a line break would cut apart.
        prompt=lambda row: str(row["prompt"]).rstrip(),
        max_new_tokens=512,
        stop=("\ndef ", "\nclass ", "\nif ", "\nprint(", "\n#", "\n@", "\n```"),
        metrics=quality.pass_at_1,
    ),
    "mbpp": TaskSpec(
        description="short Python programs from a sentence and tests (MBPP): 3-shot, pass@1",
        data=DataSet(
            folder="mbpp",
            files=dict.fromkeys(_MBPP_SPLITS, "mbpp.jsonl*"),
            hub="google-research-datasets/mbpp",
            config="full",
            origin="https://github.com/google-research/google-research/tree/master/mbpp",
            ids=_MBPP_SPLITS,
        ),
        prompt=_mbpp_prompt,
        answer=_mbpp_answer,
        shots=3,
        shot_split="prompt",
        max_new_tokens=512,
        stop=("[DONE]",),
        metrics=quality.pass_at_1,
    ),
    "cnn_dm": TaskSpec(
        description="summaries of news articles (CNN/DailyMail): 1-shot, ROUGE",
        data=_CNN_DAILYMAIL,
        prompt=lambda row: f"Article: {row['article']}\nSummary:",
        answer=lambda row: f" {row['highlights']}\n\n",
        shots=1,
        shot_split="validation",
        max_new_tokens=128,
        stop=("\n\n", "\nArticle:"),
        references=lambda row: (row["highlights"],),
        metrics=quality.rouge,
    ),
    "cnn_dm_lm": TaskSpec(
        description=f"news articles continued after {ARTICLE_WORDS} words (CNN/DailyMail)",
        data=_CNN_DAILYMAIL,
        prompt=_beginning,
        max_new_tokens=256,
    ),
    "xsum": TaskSpec(
        description="one-sentence summaries of news articles (XSum): 0-shot, ROUGE",
        data=DataSet(
            folder="xsum",
            files=_FILES_BY_SPLIT,
            hub="EdinburghNLP/xsum",
            origin="https://github.com/EdinburghNLP/XSum",
        ),
        prompt=lambda row: f"Article: {row['document']}\nSummary in one sentence:",
        answer=lambda row: f" {row['summary']}\n\n",
        shot_split="validation",
        # A line break does not end an answer: without an example, models often begin with one.
        max_new_tokens=64,
        stop=("\nArticle:",),
        references=lambda row: (row["summary"],),
        metrics=quality.first_line_rouge,
    ),
    "gsm8k": TaskSpec(
        description="word problems of school mathematics (GSM8K): 5-shot, the final number",
        data=DataSet(
            folder="gsm8k",
            files={"train": "train.jsonl*", "test": "test.jsonl*"},
            hub="openai/gsm8k",
            config="main",
            origin="https://github.com/openai/grade-school-math",
        ),
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        answer=lambda row: f" {row['answer']}\n\n",
        shots=5,
        max_new_tokens=256,
        stop=("Question:",),
        references=lambda row: (row["answer"],),
        metrics=quality.number_match,
    ),
    "mt_bench": TaskSpec(
        description="first questions of conversations (MT-Bench)",
        data=DataSet(
            folder="mt_bench",
            files={"test": "question.jsonl*"},
            hub="HuggingFaceH4/mt_bench_prompts",
            hub_splits={"test": "train"},
            origin="https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge",
        ),
        prompt=_first_turn,
        max_new_tokens=1024,
        category=lambda row: str(row["category"]),
        chat=True,
    ),
    "spec_bench": TaskSpec(
        description="the field's prompts for speculative decoding in six categories (Spec-Bench)",
        data=DataSet(
            folder="spec_bench",
            files={"test": "question.jsonl*"},
            origin="https://github.com/hemingkxia/Spec-Bench (data/spec_bench)",
        ),
        prompt=_first_turn,
        max_new_tokens=1024,
        category=_spec_bench_category,
        chat=True,
    ),
    "edits": TaskSpec(
        description="edits of Python files of the standard library, answered with the whole file",
        data=edits.EditRows(),
        prompt=edits.prompt,
        max_new_tokens=4096,
        references=lambda row: (edits.fenced(row["expected"]),),
        metrics=edits.metrics,
        category=lambda row: str(row["kind"]),
        prediction=lambda row: edits.fenced(row["file"]),
        chat=True,
    ),
}


T = TypeVar("T")

TASKS: Mapping[str, str] = {name: form.description for name, form in FORMS.items()}
_FILE_MAX_NEW_TOKENS = 256
_ALLOWED_PASS_AT_1 = functools.partial(quality.pass_at_1, allow_code_execution=True)


@dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts, and the measures of their answers.

    Attributes:
        name: as passed to `load_task`.
        samples: the prompts, the same for every mode and system.
        max_new_tokens: maximum length of an answer.
        stop: texts that end an answer.
        n_shot: worked examples before each prompt.
        metrics: samples and answers -> a value for each metric, from 0 to 1; None where there are no
            references.
        code_execution: how `metrics` isolates the code that it runs, "bubblewrap" or "rlimits";
            None where it runs none.
    """

    name: str
    samples: tuple[Sample, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    n_shot: int = 0
    metrics: quality.Metrics | None = None
    code_execution: str | None = None

    def quality(self, texts: Sequence[str]) -> dict[str, float]:
        """Return the quality of answers.

        Args:
            texts: one answer a sample. The text after a stop string is cut off, so that systems without
                stop strings are judged alike.

        Returns:
            A value from 0 to 1 for each metric; {} without metrics. Samples of a user's file that have
            no reference do not count.

        Raises:
            ValueError: there are more or fewer texts than samples.
        """
        if len(texts) != len(self.samples):
            raise ValueError(f"{len(texts)} answers to {len(self.samples)} prompts")
        if self.metrics is None:
            return {}
        return self.metrics(self.samples, [_before_stop(text, self.stop) for text in texts])


def _before_stop(text: str, stop: Sequence[str]) -> str:
    ends = [end for one in stop if (end := text.find(one)) >= 0]
    return text[: min(ends, default=len(text))]


def load_task(
    name: str,
    *,
    samples: int | None = None,
    n_shot: int | None = None,
    seed: int = 0,
    data: str | None = None,
    chat: bool = True,
    judged: bool = True,
    allow_code_execution: bool = False,
) -> Task:
    """Load a named task, or a file of prompts.

    The choice of prompts and shots depends on the seed alone. They keep the order of the data; a larger
    sample contains the smaller one of the same seed.

    Args:
        name: one of `TASKS`, or a file: .jsonl (fields `prompt` or `messages`; optional are
            `reference`, `references`, `completion`, `prediction`, `category` and `id`) or .txt (a
            prompt a paragraph).
        samples: number of prompts, evenly over the categories; None = all.
        n_shot: number of worked examples, the same before each prompt; None = the task's.
        seed: of the choice of prompts.
        data: folder of the data sets; None = $LAYERSKIP_DATA, else the hub.
        chat: True if the model has a chat template; without one, questions to an assistant are plain
            text.
        judged: True if answers will be judged: the packages and data for it are checked now.
        allow_code_execution: the user's consent to run code that a model wrote, which pass@1 needs.

    Raises:
        ValueError: the task or file does not exist, its data are not available, it takes no shots, a
            number is out of range, or it has to run code and may not; the message has the remedy.
    """
    if samples is not None and samples < 1:
        raise ValueError(f"samples is {samples}; at least 1 is needed")
    if n_shot is not None and n_shot < 0:
        raise ValueError(f"n_shot is {n_shot}; it cannot be negative")
    if name in FORMS:
        return _named(
            name, FORMS[name], samples, n_shot, seed, data, chat, judged, allow_code_execution
        )
    check_task(name, judged=False)
    if n_shot:
        raise ValueError(f"{name} is a file of prompts as they stand; shots are for named tasks")
    return _from_file(name, samples, seed, judged)


def check_task(name: str, *, judged: bool, allow_code_execution: bool = False) -> None:
    """Check a task before a model is loaded for it.

    Raises:
        ValueError: its name is no task and no file, or it has to run code and may not.
    """
    if name not in FORMS and not Path(name).expanduser().is_file():
        raise ValueError(f"{name!r} is no file and no task; the tasks are {', '.join(TASKS)}")
    if judged and name in FORMS and FORMS[name].metrics is quality.pass_at_1:
        sandbox.check_allowed(allow_code_execution)


def _named(
    name: str,
    form: TaskSpec,
    samples: int | None,
    n_shot: int | None,
    seed: int,
    data: str | None,
    chat: bool,
    judged: bool,
    allow_code_execution: bool,
) -> Task:
    shots = form.shots if n_shot is None else n_shot
    if shots and form.answer is None:
        raise ValueError(f"{name} takes no shots: leave n_shot out, or 0")
    if judged:
        quality.check_can_judge(form.metrics, allow_code_execution=allow_code_execution)
    rows = list(_rows_with_prompt(name, form, data, judged))
    others = form.data.rows(form.shot_split, data) if shots else []
    if shots > len(others):
        raise ValueError(f"n_shot is {shots}; {name} has {len(others)} examples to show")
    examples = draw(others, shots, seed)
    with _fitting(f"{name}, the examples to show"):
        before = "".join(f"{form.prompt(row)}{form.answer(row)}" for row in examples if form.answer)

    def sample(position: int, row: Mapping[str, Any]) -> Sample:
        text = f"{before}{form.prompt(row)}"
        return Sample(
            id=_id(row, f"{name}:{position}"),
            prompt=_question(text) if form.chat and chat else text,
            references=form.references(row),
            category=form.category(row),
            prediction=form.prediction(row),
            fields=dict(row),
        )

    metrics, code_execution = form.metrics, None
    if form.metrics is quality.pass_at_1:
        metrics = None
        if judged:
            metrics = _ALLOWED_PASS_AT_1
            code_execution = sandbox.isolation()
    numbered = list(enumerate(rows, 1))
    chosen = draw(numbered, samples, seed, group=lambda pair: form.category(pair[1]))
    return Task(
        name=name,
        samples=tuple(sample(position, row) for position, row in chosen),
        max_new_tokens=form.max_new_tokens,
        stop=form.stop,
        n_shot=shots,
        metrics=metrics,
        code_execution=code_execution,
    )


def _rows_with_prompt(
    name: str, form: TaskSpec, data: str | None, judged: bool
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows that have a prompt, and check their fields."""
    for number, row in enumerate(form.data.rows("test", data), 1):
        with _fitting(f"{name}, row {number}"):
            has_prompt = form.prompt(row) is not None
            if has_prompt:  # check that all other fields are there too
                form.references(row), form.category(row)
                if judged and form.metrics is quality.pass_at_1:
                    quality.program(Sample(id="", prompt="", fields=row), "")
        if has_prompt:
            yield row


@contextlib.contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Turn errors of a row's fields into a ValueError that names the row."""
    try:
        yield
    except (KeyError, IndexError, TypeError) as error:
        lacks = f"{type(error).__name__}: {error}"
        raise ValueError(f"{what}: not as docs/how-to/bench.md has it ({lacks})") from error


def _question(text: str) -> tuple[Mapping[str, str], ...]:
    return ({"role": "user", "content": text},)


def _id(row: Mapping[str, Any], otherwise: str) -> str:
    names = ("task_id", "question_id", "prompt_id", "id")
    return next((str(row[name]) for name in names if name in row), otherwise)


def _from_file(name: str, samples: int | None, seed: int, judged: bool) -> Task:
    from layerskip.data.readers import read_rows

    rows = [_file_sample(where, row) for where, row in read_rows(name)]
    if not rows:
        raise ValueError(f"{name} holds no prompts")
    chosen = tuple(draw(rows, samples, seed, group=lambda sample: sample.category))
    has_references = any(sample.references for sample in chosen)
    if has_references and judged:
        quality.check_can_judge(quality.match_and_rouge)
    return Task(
        name=name,
        samples=chosen,
        max_new_tokens=_FILE_MAX_NEW_TOKENS,
        metrics=_file_metrics if has_references else None,
    )


def _file_sample(where: str, row: Mapping[str, Any]) -> Sample:
    prompt, answer = prompt_of(row)
    if "prompt" not in row and isinstance(row.get("text"), str):  # of a .txt file
        prompt = prompt or row["text"].rstrip("\n")
    if not prompt:
        raise ValueError(f"{where} needs {NEEDED}")
    fields = (row.get(name) for name in ("references", "reference", "completion"))
    value: Any = next((one for one in (*fields, answer) if one is not None), ())
    references = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(reference, str) for reference in references):
        raise ValueError(f"{where} has references that are no texts")
    prediction: Any = row.get("prediction")
    if prediction is not None and not isinstance(prediction, str):
        raise ValueError(f"{where} has a prediction that is no text")
    return Sample(
        id=str(row.get("id", where)),
        prompt=prompt,
        references=references,
        category=None if row.get("category") is None else str(row["category"]),
        prediction=prediction,
        fields=dict(row),
    )


def _file_metrics(samples: Sequence[Sample], texts: Sequence[str]) -> dict[str, float]:
    pairs = [pair for pair in zip(samples, texts, strict=True) if pair[0].references]
    if not pairs:  # those with references did not fit into the context
        return {}
    return quality.match_and_rouge([sample for sample, _ in pairs], [text for _, text in pairs])


def draw(
    items: Sequence[T],
    count: int | None,
    seed: int,
    group: Callable[[T], Hashable] = lambda item: None,
) -> list[T]:
    """Sample items evenly over groups, in their order; None = all."""
    if count is None or count >= len(items):
        return list(items)
    order = list(range(len(items)))
    random.Random(seed).shuffle(order)
    groups: dict[Hashable, list[int]] = {}
    for position in order:
        groups.setdefault(group(items[position]), []).append(position)
    # Alternate between the groups.
    alternating = chain.from_iterable(zip_longest(*groups.values()))
    evenly = [position for position in alternating if position is not None]
    return [items[position] for position in sorted(evenly[:count])]
