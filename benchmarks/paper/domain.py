"""Finetuning on a domain: SmolLM2 on Python code, then HumanEval as its own drafter.

    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.domain \\
        --allow-code-execution
    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.domain \\
        --allow-code-execution --variants control

Rows to learn from are sources of the standard library and of installed packages: half of them functions
with their signature and docstring as the prompt (without a loss) and the body as the completion, half
running text. Measured on prompts of HumanEval, greedy: agreement and acceptance of exits, and the
speedup of self-speculative decoding over plain decoding of the same checkpoint, prompts and run.
`recipe` puts the weight on few exits, for a budget of minutes; `paper` has the paper's settings;
`control` learns the same rows without the recipe.
"""

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import run

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from paper.checkpoints import BRIEF, TINY, new_model, tokens_of, write_rows
from paper.corpus import STANDARD_LIBRARY, Corpus, functions, pieces
from paper.finetuning import BEFORE, CONTROL, add_options, each_variant, tokenizer_of
from paper.measures import drafting
from paper.record import Record, listed, numbers, options_of

PACKAGES = ("torch", "sympy", "networkx")
FEW_EXITS: dict[str, Any] = {
    "fixed_exits": [8],
    "exits": [4, 6, 12, 15, 20],
    "rotation": 5,
    "exit_weighting": "equal",
    "distillation_weight": 1.0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    BEFORE: {},
    "recipe": FEW_EXITS,
    "control": CONTROL,
    "paper": {"learning_rate": 1e-4},
}
SMOKE = {
    **BRIEF,
    "samples": 2,
    "exits": [1, 2],
    "timed_exits": [1],
    "draft_tokens": [2],
    "max_new_tokens": 8,
    "source": [STANDARD_LIBRARY],
    "dtype": "float32",
}


def main() -> None:
    options = _options()
    record = Record("domain", options, VARIANTS)
    corpus = Corpus.of(options.source, options.most_bytes)
    if options.smoke:
        tokenizer = new_model(Path(options.model), corpus.train, 300, TINY, weights=True)
        write_rows(Path(options.task), functions(corpus.held_out))
    else:
        tokenizer = tokenizer_of(options.model)
    rows = _rows(options, corpus, tokenizer)
    task = load_task(
        options.task,
        samples=options.samples,
        allow_code_execution=options.allow_code_execution,
    )

    def measure(model: LayerSkipModel, source: str) -> dict[str, Any]:
        found = drafting(
            model,
            task,
            source,
            exits=options.exits,
            timed_exits=options.timed_exits,
            draft_tokens=options.draft_tokens,
            max_new_tokens=options.max_new_tokens,
        )
        return {"corpus": corpus.describe(), **found}

    each_variant(record, VARIANTS, "domain", rows, tokenizer, measure)


def _options() -> argparse.Namespace:
    parser = options_of(
        "domain",
        "Finetuning on code. About 60 to 70 minutes on one core for before, recipe and control, and "
        "30 more for each further variant (an estimate).",
        "of training, for each variant: it ends then, with its learning rate",
        VARIANTS,
    )
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    add_options(parser, steps=50, learning_rate=4e-4)
    parser.add_argument("--source", type=listed, default=[STANDARD_LIBRARY, *found])
    parser.add_argument("--task", default="humaneval", help="as for `layerskip bench`")
    parser.add_argument("--allow-code-execution", action="store_true", help="for humaneval, mbpp")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--exits", type=numbers, default=[4, 6, 8, 12, 15, 20, 25])
    parser.add_argument("--timed-exits", type=numbers, default=[6, 8, 15])
    parser.add_argument("--draft-tokens", type=numbers, default=[2, 4, 6, 12])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.set_defaults(variants=[BEFORE, "recipe", "control"], most_bytes=20_000_000)
    options = parser.parse_args()
    if options.smoke:
        base, task = options.work / "base", options.work / "prompts.jsonl"
        vars(options).update(SMOKE, model=str(base), task=str(task))
    return options


def _rows(options: argparse.Namespace, corpus: Corpus, tokenizer: Any) -> list[dict[str, str]]:
    """Functions and running text, about as many tokens of each."""
    half = options.steps * options.batch_size * options.length // 2
    return [
        row
        for source in (functions(corpus.train), pieces(corpus.train, tokenizer, options.length))
        for row in _until(half, source, tokenizer, options.length)
    ]


def _until(
    tokens: int, rows: Iterator[dict[str, str]], tokenizer: Any, length: int
) -> Iterator[dict[str, str]]:
    """Rows until they have so many tokens."""
    while tokens > 0 and (row := next(rows, None)) is not None:
        tokens -= tokens_of([row], tokenizer, length)
        yield row


if __name__ == "__main__":
    run(main)
