"""Text that every machine has: the sources of Python's standard library and of installed packages.

Files come in an order that looks random and is the same everywhere; one in twenty is held out.
"""

import importlib.util
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerskip.data.python_files import python_files, standard_library
from layerskip.data.readers import read_text
from paper import python_functions

STANDARD_LIBRARY = "stdlib"
HELD_OUT = 20  # one file in so many


@dataclass(frozen=True)
class Corpus:
    """Texts of whole files.

    Attributes:
        sources: where they come from.
        train: texts to learn from.
        held_out: texts of other files, to measure with.
    """

    sources: tuple[str, ...]
    train: tuple[str, ...]
    held_out: tuple[str, ...]

    @classmethod
    def of(cls, sources: Sequence[str], most_bytes: int | None = None) -> "Corpus":
        """Read `stdlib`, installed packages by their import name, or text files.

        Args:
            sources: where to read; of a text file nothing is held out.
            most_bytes: stop reading Python files after so much text; None reads all.

        Raises:
            ValueError: a source is neither installed nor a file.
        """
        files = [source for source in sources if Path(source).is_file()]
        trained = [read_text(file) for file in files]
        held_out: list[str] = []
        total = 0
        for name, path in _python_files([source for source in sources if source not in files]):
            text = path.read_text(encoding="utf-8", errors="ignore")
            (trained if zlib.crc32(name.encode()) % HELD_OUT else held_out).append(text)
            total += len(text)
            if most_bytes is not None and total >= most_bytes and held_out:
                break
        return cls(tuple(sources), tuple(trained), tuple(held_out))

    def describe(self) -> dict[str, Any]:
        """Describe the corpus for a row of results."""
        return {
            "sources": list(self.sources),
            "train_texts": len(self.train),
            "train_characters": sum(map(len, self.train)),
            "held_out_texts": len(self.held_out),
            "held_out_crc32": zlib.crc32("".join(self.held_out).encode()),
        }


def _python_files(sources: Iterable[str]) -> list[tuple[str, Path]]:
    """Name and place of each file, in the order of the names' checksums."""
    found = []
    for source in sources:
        root = _root(source)
        for path in python_files(root):
            found.append((f"{source}/{path.relative_to(root).as_posix()}", path))
    return sorted(found, key=lambda pair: (zlib.crc32(pair[0][::-1].encode()), pair[0]))


def _root(source: str) -> Path:
    if source == STANDARD_LIBRARY:
        return standard_library()
    spec = importlib.util.find_spec(source) if source.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{source!r} is no file, no installed package, and not {STANDARD_LIBRARY}")
    return Path(spec.submodule_search_locations[0])


def pieces(texts: Iterable[str], tokenizer: Any, length: int) -> Iterator[dict[str, str]]:
    """Cut texts between lines into rows of running text of at most `length` tokens, two kept free.

    A line that is longer than that by itself is left out.
    """
    room = length - 2  # for the tokens that stand before and after a text
    for text in texts:
        lines = text.splitlines(keepends=True)
        kept: list[str] = []
        used = 0
        for line, ids in zip(lines, _ids(tokenizer, lines), strict=True):
            if used + len(ids) > room and kept:
                yield {"text": "".join(kept)}
                kept, used = [], 0
            if len(ids) <= room:
                kept.append(line)
                used += len(ids)
        if "".join(kept).strip():
            yield {"text": "".join(kept)}


def _ids(tokenizer: Any, lines: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []
    return ids


def functions(texts: Iterable[str]) -> Iterator[dict[str, str]]:
    """Python functions with a docstring: signature and docstring as prompt, the body as completion."""
    for text in texts:
        for function in python_functions.functions(text):
            if function.head is not None:
                prompt, completion = function.cut(function.head)
                if completion:
                    yield {"prompt": prompt, "completion": completion}


def first_words(texts: Iterable[str], words: int) -> str:
    """The beginnings of many texts as one: each gives as much as the others, until it is enough."""
    share = 1000  # between single blanks: indentation counts
    parts = (" ".join(text.split(" ")[:share]) for text in texts)
    kept: list[str] = []
    while words > 0 and (part := next(parts, None)) is not None:
        kept.append(part)
        words -= len(part.split())
    return "\n\n".join(kept)
