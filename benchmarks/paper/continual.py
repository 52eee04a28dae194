"""Continual pretraining: the exits of a pretrained checkpoint before and after, and its last layer.

    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.continual
    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.continual --variants control,paper

The checkpoint is trained further on text and code in equal parts: the validation part of WikiText-2 and
articles of CNN/DailyMail, and Python's standard library. Measured is the perplexity of exits on the test
part of WikiText-2, which is never trained on, and on held-out files of code. `recipe` puts the weight on
few exits; `paper` has the paper's settings; `control` is trained on the same rows without the recipe.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from common import run

from layerskip import LayerSkipModel
from layerskip.data.readers import is_table, local_files, read_rows, read_text
from paper.checkpoints import BRIEF, TINY, new_model
from paper.corpus import STANDARD_LIBRARY, Corpus, first_words, pieces
from paper.finetuning import BEFORE, CONTROL, add_options, each_variant, tokenizer_of
from paper.measures import exits_of
from paper.record import Record, listed, numbers, options_of

FEW_EXITS: dict[str, Any] = {
    "fixed_exits": [8],
    "exits": [4, 12, 15, 20, 25],
    "rotation": 5,
    "exit_weighting": "linear",
    "distillation_weight": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    BEFORE: {},
    "recipe": FEW_EXITS,
    "control": CONTROL,
    "paper": {"learning_rate": 3e-5},
}
SMOKE = {**BRIEF, "test_words": 100, "exits": [2, 4], "dtype": "float32"}


def main() -> None:
    options = _options()
    record = Record("continual", options, VARIANTS)
    corpus = Corpus.of([STANDARD_LIBRARY], options.most_bytes)
    tokenizer = _prepared(options, corpus)
    rows = _rows(options, corpus, tokenizer)
    tests = {
        "text": read_text(options.test, options.test_words or None),
        "code": first_words(corpus.held_out, (options.test_words or 20_000) // 4),
    }

    def measure(model: LayerSkipModel, source: str) -> dict[str, Any]:
        exits = sorted({*options.exits, len(model.decoder.layers)})
        found = {name: exits_of(model, text, options.length, exits) for name, text in tests.items()}
        return {"corpus": corpus.describe(), **found}

    each_variant(record, VARIANTS, "continual", rows, tokenizer, measure)


def _options() -> argparse.Namespace:
    parser = options_of(
        "continual",
        "Continual pretraining. Two to three hours on one core for each variant.",
        "of training, for each variant: it ends then, with its learning rate",
        VARIANTS,
    )
    add_options(parser, steps=600, learning_rate=2e-4)
    parser.add_argument(
        "--text",
        default="$LAYERSKIP_DATA/wikitext2/valid.txt*,$LAYERSKIP_DATA/cnn_dailymail/*.jsonl*",
        help="text files, or files of rows with a field article; separated by commas",
    )
    parser.add_argument(
        "--test", default="wikitext2", help="a text file, or the test of WikiText-2"
    )
    parser.add_argument(
        "--test-words",
        type=int,
        default=20_000,
        help="0 = all; of code a quarter",
    )
    parser.add_argument("--exits", type=numbers, default=[4, 8, 12, 15, 20, 25])
    parser.set_defaults(variants=[BEFORE, "recipe", "control"], most_bytes=None)
    options = parser.parse_args()
    if options.smoke:
        base = options.work / "base"
        text = options.work / "text.txt"
        vars(options).update(SMOKE, model=str(base), text=str(text), test=str(text))
    return options


def _prepared(options: argparse.Namespace, corpus: Corpus) -> Any:
    """The model's tokenizer; for a smoke run a tiny model and a text are made first."""
    if options.smoke:
        options.work.mkdir(parents=True, exist_ok=True)
        Path(options.text).write_text(first_words(corpus.held_out, 2_000), encoding="utf-8")
        return new_model(Path(options.model), corpus.train, 300, TINY, weights=True)
    return tokenizer_of(options.model)


def _rows(options: argparse.Namespace, corpus: Corpus, tokenizer: Any) -> list[dict[str, str]]:
    """Text and code in equal parts, as many rows as are learnt."""
    half = options.steps * options.batch_size // 2
    return [
        row
        for texts in (_texts(listed(options.text)), corpus.train)
        for row in islice(pieces(texts, tokenizer, options.length), half)
    ]


def _texts(sources: list[str]) -> Iterator[str]:
    """Yield the texts of files, and articles with a sentence a line: rows are cut between lines.

    Raises:
        ValueError: a file cannot be read.
    """
    for source in sources:
        for file in local_files(source) or [source]:
            if is_table(file):
                for _, row in read_rows(file):
                    yield row["article"].replace(". ", ".\n")
            else:
                yield read_text(file)


if __name__ == "__main__":
    run(main)
