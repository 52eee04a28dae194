"""Shared parts of the experiments that start from a pretrained checkpoint."""

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from layerskip import LayerSkipModel
from layerskip.training import TrainConfig
from layerskip.training.loading import pretrained
from paper.checkpoints import tokens_of, trained, write_rows
from paper.record import Record

BEFORE = "before"
CONTROL: dict[str, Any] = {"variant": "EE", "curriculum": "none"}  # the last layer's loss alone
# Those of a smoke run, whose model has 4 layers.
SMOKE_EXITS = {"fixed_exits": [1], "exit_weighting": "linear", "exits": [2, 3], "rotation": 2}


def add_options(parser: argparse.ArgumentParser, *, steps: int, learning_rate: float) -> None:
    """Model and length of training."""
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument(
        "--learning-rate", type=float, default=learning_rate, help="of recipe and control"
    )
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compile", action="store_true", help="the layers, with torch.compile")


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a folder, hub id or built-in name."""
    return AutoTokenizer.from_pretrained(pretrained(model)[0])


def each_variant(
    record: Record,
    variants: dict[str, dict[str, Any]],
    regime: str,
    rows: list[dict[str, str]],
    tokenizer: Any,
    measure: Callable[[LayerSkipModel, str], dict[str, Any]],
) -> None:
    """Train and measure what the record lacks of the variants asked for.

    Args:
        record: with the options of `add_options`.
        variants: what each changes of the paper's recipe for the regime; `BEFORE` is not trained.
        regime: of `RecipeConfig.preset`.
        rows: to learn from, in any order.
        tokenizer: of the model.
        measure: model and its name to figures.
    """
    options = record.options
    random.Random(0).shuffle(rows)
    data = write_rows(options.work / "rows.jsonl", rows)
    tokens = tokens_of(rows, tokenizer, options.length)
    if options.smoke:
        variants = variants | {"recipe": SMOKE_EXITS}
    for variant in options.variants:
        if not record.lacks(variant):
            continue
        source, row = options.model, {"model": options.model}
        if variant != BEFORE:
            config = _config(options, regime, variants[variant], data, options.work / variant)
            row |= {"trained": trained(config, tokens, again=options.again)}
            source = config.output
        model = LayerSkipModel.from_pretrained(source, dtype=options.dtype)
        row |= {"layers": len(model.decoder.layers), **measure(model, source)}
        record.add(variant, row, model.decoder.kernels)


def _config(
    options: argparse.Namespace, regime: str, changes: dict[str, Any], data: Path, output: Path
) -> TrainConfig:
    return TrainConfig.from_mapping(
        {
            "model": options.model,
            "regime": regime,
            "data": str(data),
            "packing": True,
            "max_length": options.length,
            "batch_size": options.batch_size,
            "max_steps": options.steps,
            "max_minutes": options.minutes,
            "learning_rate": options.learning_rate,
            "warmup_steps": options.steps // 10,
            "precision": options.precision,
            "compile": options.compile,
            "log_steps": 5,
            "save_steps": 50,
            "keep_checkpoints": 1,
            "output": str(output),
            "resume": True,
            **changes,
        }
    )
