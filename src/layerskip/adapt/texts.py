"""Prompts and texts to train on: those of files, and what every Python installation has."""

import ast
import importlib.metadata
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from layerskip.adapt.config import PYTHON_TEXTS
from layerskip.data.python_files import python_files, standard_library
from layerskip.data.readers import prompt_of, read_rows

_MAX_FILES = 500  # of Python sources
_PACKAGES = (
    "numpy",
    "torch",
    "transformers",
)  # that this package needs, beside the standard library
_SHORTEST, _LONGEST = 200, 6000  # characters of a text
_SUBJECTS = " ".join(
    (
        "bees bread bridges candles castles cats chess cities clouds coffee comets coral dance",
        "deserts dreams elephants engines farming fashion festivals fire fishing forests",
        "friendship gardens glass gold gravity honey horses ice insects islands jazz kites lakes",
        "languages leadership libraries lightning magnets maps markets medicine memory mirrors",
        "money mountains museums music oceans painting paper patience photography pirates planets",
        "poetry printing rain recycling rice rivers robots salt schools ships silk sleep snow",
        "soil space spiders sports stars steel storms sugar taxes tea teamwork theatre time",
        "trains trees vaccines volcanoes water weather whales wheat wind winter wolves work",
        "algorithms databases encryption recursion compilers networks probability triangles",
        "fractions democracy trade elections history law philosophy biology chemistry physics",
    )
).split(" ")
_QUESTIONS = (
    "What are {a}, and why do they matter?",
    "Explain {a} to a ten-year-old child.",
    "Write a short story about {a} and {b}.",
    "Write an email to a colleague about {a}. Keep it polite and short.",
    "Give me five tips about {a}, as a numbered list.",
    "Compare {a} and {b} in a few sentences.",
    "What is the history of {a}?",
    "Describe how {a} could change in the next fifty years.",
    "List three advantages and three disadvantages of {a}.",
    "Write a poem about {a}.",
    "You are a travel guide. Tell me about {a} in your country.",
    "What would happen if there were no {a}?",
)
_SUMS = (
    "Anna has {x} boxes with {y} pencils each. She gives away {z} pencils. How many pencils are left?",
    "A train goes {x} miles an hour for {y} hours and stops for {z} minutes. How far does it get?",
    "A shop sells {x} apples a day at {y} cents each. How much does it earn in {z} days?",
    "Tom reads {x} pages on Monday, twice as many on Tuesday, and {y} on Wednesday. How many in all?",
    "The sides of a garden are {x} and {y} meters long. What are its area and its perimeter?",
)
_OF_TEXTS = (
    "Summarize the following text in two sentences.\n\n{text}",
    "What is the main point of this text?\n\n{text}",
    "Rewrite the following text in simple words.\n\n{text}",
    "Answer with the most important facts of this passage:\n\n{text}",
)
_OF_CODE = (
    "Write a Python function `{name}` that does the following.\n\n{doc}",
    "Explain what this Python code does.\n\n```python\n{code}\n```",
    "Complete this Python function.\n\n```python\n{head}\n```",
)


def load_texts(
    sources: tuple[str, ...], seed: int, max_characters: int
) -> tuple[list[Any], list[str]]:
    """Return prompts (texts or conversations) and texts of some sources, each once, in random order.

    Args:
        sources: files, hub ids, or `PYTHON_TEXTS`.
        seed: of the order.
        max_characters: length limit; a longer prompt keeps its end, a longer text is split.

    Raises:
        ValueError: a source cannot be read, or there is no prompt at all.
    """
    prompts: dict[str, Any] = {}
    texts: dict[str, None] = {}
    for source in sources:
        if source == PYTHON_TEXTS:
            own_prompts, own_texts = python_texts(seed)
            prompts |= {prompt: prompt for prompt in own_prompts}
            texts |= dict.fromkeys(own_texts)
            continue
        for where, row in read_rows(source):
            prompt, answer = prompt_of(row)
            prompt = prompt or row.get("prompt")
            text = answer if prompt is None else row.get("text")
            text = text or row.get("text")
            if isinstance(prompt, str):
                prompt = prompt[-max_characters:]
            if prompt:
                prompts[str(prompt)] = prompt
            if isinstance(text, str) and text.strip():
                texts |= dict.fromkeys(
                    text[i : i + max_characters] for i in range(0, len(text), max_characters)
                )
            if not prompt and not text:
                raise ValueError(f"{where}: a field prompt, messages or text is needed")
    if not prompts:
        raise ValueError(
            "there are no prompts in the data: add --data python, or rows with prompts"
        )
    shuffled_prompts, shuffled_texts = list(prompts.values()), list(texts)
    random.Random(seed).shuffle(shuffled_prompts)
    random.Random(seed).shuffle(shuffled_texts)
    return shuffled_prompts, shuffled_texts


def python_texts(seed: int) -> tuple[list[str], list[str]]:
    """Return prompts and texts made of what is installed with Python.

    Texts are descriptions of packages, docstrings and functions; prompts ask for summaries of them, for
    code, for sums, and about everyday subjects.
    """
    chosen = random.Random(seed)
    texts = [text for text in _descriptions() if len(text) >= _SHORTEST]
    prompts: list[str] = []
    for node, code in _definitions(chosen):
        doc = ast.get_docstring(node) or ""
        if len(doc) >= _SHORTEST:
            texts.append(doc)
        if _SHORTEST <= len(code) <= _LONGEST:
            texts.append(code)
        if isinstance(node, ast.FunctionDef) and len(doc) >= 40 and len(code) <= 2000:
            head = "\n".join(code.split("\n")[: (node.body[0].end_lineno or 0) - node.lineno + 1])
            fields = {"name": node.name, "doc": doc[:600], "code": code, "head": head}
            prompts.append(chosen.choice(_OF_CODE).format(**fields))
    passages = [text for text in texts if 300 <= len(text) <= 2000 and "def " not in text]
    prompts = chosen.sample(prompts, min(len(prompts), 3000))
    passages = chosen.sample(passages, min(len(passages), 1500))
    prompts += [chosen.choice(_OF_TEXTS).format(text=text) for text in passages]
    prompts += [
        question.format(a=a, b=b)
        for question in _QUESTIONS
        for a, b in zip(_SUBJECTS, chosen.sample(_SUBJECTS, len(_SUBJECTS)), strict=True)
    ]
    for _ in range(300):
        x, y, z = (chosen.randint(2, 60) for _ in range(3))
        prompts.append(chosen.choice(_SUMS).format(x=x, y=y, z=z))
    return prompts, texts


def _descriptions() -> Iterator[str]:
    """Iterate over the descriptions of installed packages, paragraph groups of a text each."""
    for package in importlib.metadata.distributions():
        text = package.metadata.json.get("description") if package.metadata else None
        if isinstance(text, str):
            yield from textwrap.wrap(text, _LONGEST, replace_whitespace=False)


_Definition = ast.Module | ast.ClassDef | ast.FunctionDef


def _definitions(chosen: random.Random) -> Iterator[tuple[_Definition, str]]:
    """Iterate over modules, classes and functions of installed sources, with their code."""
    installed = Path(sysconfig.get_path("purelib"))
    folders = [standard_library(), *(installed / name for name in _PACKAGES)]
    files = [path for folder in folders for path in python_files(folder)]
    for path in chosen.sample(files, min(len(files), _MAX_FILES)):
        try:
            source = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        lines = source.split("\n")
        for node in (tree, *tree.body):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                yield node, "\n".join(lines[node.lineno - 1 : node.end_lineno])
            elif isinstance(node, ast.Module):
                yield node, ""


def pack_texts(
    texts: list[str], encode: Callable[[str], list[int]], max_length: int
) -> Iterator[list[int]]:
    """Tokenize texts; short ones are joined, long ones cut, to pieces of about `max_length` tokens."""
    piece: list[int] = []
    for text in texts:
        ids = encode(text + "\n\n")
        while ids:
            room = max_length - len(piece)
            piece, ids = piece + ids[:room], ids[room:]
            if len(piece) == max_length:
                yield piece
                piece = []
    if len(piece) > 1:
        yield piece
