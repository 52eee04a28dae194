"""Pretraining from scratch: what layer dropout and early exit loss each do to every exit.

    PYTHONPATH=benchmarks python -m paper.pretrain --compile
    PYTHONPATH=benchmarks python -m paper.pretrain --compile --variants baseline,LD+EE --seed 1 \\
        --work runs/paper/pretrain-seed-1 \\
        --output benchmarks/results/paper/pretrain-seed-1.json
    PYTHONPATH=benchmarks python -m paper.pretrain --variants LD+EE --source stdlib,torch,sympy \\
        --steps 3000 --compile --work runs/paper/pretrain-long \\
        --output benchmarks/results/paper/pretrain-long.json

A Llama of 12 layers and its own byte-level tokenizer learn Python's standard library, code and
docstrings. All variants take the same steps over the same rows, and differ in the recipe alone. Measured
is the perplexity of every exit on files that were held out.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

from common import run

from layerskip import LayerSkipModel
from layerskip.training import TrainConfig
from paper.checkpoints import (
    BRIEF,
    TINY,
    new_model,
    parameters_of,
    tokens_of,
    trained,
    write_rows,
)
from paper.corpus import STANDARD_LIBRARY, Corpus, first_words, pieces
from paper.measures import exits_of
from paper.record import Record, listed, options_of

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
# What each variant changes of the paper's recipe for pretraining (LD+EE).
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {"variant": "EE", "curriculum": "none"},
    "LD": {"variant": "LD"},
    "EE": {"variant": "EE"},
    "LD+EE": {},
    # At the others' mean rate: the shape is compared, not how much is dropped.
    "LD+EE uniform over layers": {"dropout_over_layers": "uniform", "p_max": 0.045},
    "LD+EE constant over steps": {"dropout_over_steps": "none", "p_max": 0.044},
    "LD+EE gradual": {"curriculum": "gradual"},
    "LD+EE all exits": {"curriculum": "all"},
}
SMOKE = {**BRIEF, "vocabulary": 300, "held_out_words": 100}


def main() -> None:
    options = _options()
    record = Record("pretrain", options, VARIANTS)
    corpus = Corpus.of(options.source, options.most_bytes)
    base: Path = options.work / "base"
    shape = TINY if options.smoke else SHAPE
    tokenizer = new_model(base, corpus.train, options.vocabulary, shape, weights=False)
    rows = list(pieces(corpus.train, tokenizer, options.length))
    data = write_rows(options.work / "rows.jsonl", rows)
    tokens = tokens_of(rows, tokenizer, options.length)
    held_out = first_words(corpus.held_out, options.held_out_words)
    end = math.inf if options.minutes is None else time.monotonic() + 60 * options.minutes
    for variant in options.variants:
        if not record.lacks(variant):
            continue
        if time.monotonic() >= end:
            print("the minutes are over; the same command goes on", flush=True)
            break
        config = _config(variant, base, data, shape["num_hidden_layers"], options)
        learned = trained(config, tokens, again=options.again)
        model = LayerSkipModel.from_pretrained(config.output, dtype=options.dtype)
        row = {
            "model": f"Llama, {parameters_of(Path(config.output)) / 1e6:.1f}M parameters",
            "trained": learned,
            "corpus": corpus.describe(),
            "exits": exits_of(model, held_out, options.length),
        }
        record.add(variant, row, model.decoder.kernels)


def _options() -> argparse.Namespace:
    parser = options_of(
        "pretrain",
        "Pretraining from scratch. About two hours on one core for the eight variants, with --compile.",
        "begin no further variant after so long; the same command goes on",
        VARIANTS,
    )
    parser.add_argument(
        "--source",
        type=listed,
        default=[STANDARD_LIBRARY],
        help="stdlib, installed packages by import name, text files",
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of all variants")
    parser.add_argument("--seed", type=int, default=0, help="of weights, row order, skipped layers")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compile", action="store_true", help="the layers, with torch.compile")
    parser.add_argument("--held-out-words", type=int, default=20_000)
    parser.set_defaults(dtype="float32", most_bytes=None)
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def _config(
    variant: str, base: Path, data: Path, layers: int, options: argparse.Namespace
) -> TrainConfig:
    name = variant.replace(" ", "-").replace("+", "-")
    return TrainConfig.from_mapping(
        {
            "model": str(base),
            "from_scratch": True,
            "regime": "pretrain",
            "rotation": layers - 1,  # the paper's: 23 of 24 layers, 31 of 32
            **VARIANTS[variant],
            "data": str(data),
            "packing": True,
            "max_length": options.length,
            "batch_size": options.batch_size,
            "max_steps": options.steps,
            "learning_rate": options.learning_rate,
            "warmup_steps": options.steps // 20,
            "weight_decay": 0.1,
            "seed": options.seed,
            "precision": options.precision,
            "compile": options.compile,
            "save_steps": 100,
            "keep_checkpoints": 1,
            "output": str(options.work / name),
            "resume": True,
        }
    )


if __name__ == "__main__":
    run(main)
