"""The named tasks: which rows, how a row becomes a prompt, where an answer ends, what is measured."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from layerskip.bench import quality
from layerskip.bench.data_sets import DataSet, Row

ARTICLE_WORDS = 128  # of an article that is to be continued


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a named task is made of.

    Attributes:
        description: one line for lists.
        data: the data set; its test split is asked.
        prompt: row -> prompt, without shots; None leaves the row out.
        max_new_tokens: tokens an answer may have.
        stop: texts that end an answer.
        answer: row -> what follows the prompt in a shot, up to the next shot; None where the task
            takes no shots.
        shots: how many by default.
        shot_split: where they are drawn from, never the test split.
        references: row -> right answers.
        metrics: measures of quality, None for none.
        category: row -> category; drawn prompts are spread evenly over them.
        chat: prompts are questions to an assistant, so a chat template is used where there is one.
    """

    description: str
    data: DataSet
    prompt: Callable[[Row], str | None]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    answer: Callable[[Row], str] | None = None
    shots: int = 0
    shot_split: str = "train"
    references: Callable[[Row], tuple[str, ...]] = lambda row: ()
    metrics: quality.Metrics | None = None
    category: Callable[[Row], str | None] = lambda row: None
    chat: bool = False


def _beginning(row: Row) -> str | None:
    start = re.match(rf"(?:\S+\s+){{{ARTICLE_WORDS - 1}}}\S+(?=\s)", row["article"])
    return start and start.group()


def _mbpp_prompt(row: Row) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _mbpp_answer(row: Row) -> str:
    code = row["code"].replace("\r\n", "\n").strip()
    return f"{code}\n[DONE]\n\n"


def _first_turn(row: Row) -> str:
    turns = row["turns"] if "turns" in row else row["prompt"]
    return str(turns[0])


def _spec_bench_category(row: Row) -> str:
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

FORMS: Mapping[str, Form] = {
    "topv2": Form(
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
    "humaneval": Form(
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
    "mbpp": Form(
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
    "cnn_dm": Form(
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
    "cnn_dm_lm": Form(
        description=f"news articles continued after {ARTICLE_WORDS} words (CNN/DailyMail)",
        data=_CNN_DAILYMAIL,
        prompt=_beginning,
        max_new_tokens=256,
    ),
    "xsum": Form(
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
        # A line break is no end here: without an example, models often begin with one.
        max_new_tokens=64,
        stop=("\nArticle:",),
        references=lambda row: (row["summary"],),
        metrics=quality.first_line_rouge,
    ),
    "gsm8k": Form(
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
    "mt_bench": Form(
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
    "spec_bench": Form(
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
}
