"""Finetuning on a task: SmolLM2 on TOPv2, exact match and speedup at every exit, against a control.

    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.task
    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.task --variants paper

Training is that of examples/topv2_answers.yaml with three exits, about 1/4, 1/2 and 3/4 up (`recipe`),
the same rows without the recipe (`control`), or the paper's settings (`paper`, of examples/task.yaml).
`smollm2-135m-topv2` is the built-in checkpoint, trained with one exit, 7, on ten times the rows; its
4-bit weights are dequantized. `late exit` trains that checkpoint for 1,500 steps more, with a second
exit, about 3/4 up. The test has the rows that are not in training, but for case and spaces. Agreement
and acceptance are measured as in benchmarks/checkpoint.py.
"""

import argparse
import lzma
import os
from pathlib import Path
from typing import Any

from checkpoint import acceptance_by_exit, greedy_answers, unseen
from common import run

from layerskip import LayerSkipModel
from layerskip.bench.bench import BenchConfig, bench
from layerskip.bench.tasks import draw, load_task
from layerskip.data.readers import DATA_VARIABLE, read_rows
from layerskip.training import TrainConfig
from paper.checkpoints import TINY, new_model, tokens_of, trained
from paper.finetuning import CONTROL, SMOKE_EXITS, tokenizer_of
from paper.record import ROOT, Record, numbers, options_of

ALIKE = "topv2_answers.yaml"
BUILT_IN = "smollm2-135m-topv2"
# The example that a variant's settings come from, and what it changes of them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    # Exit 22 has a loss at every step, the earlier exits at every second one.
    "recipe": (ALIKE, {"exits": [7, 15], "fixed_exits": [22], "rotation": 2}),
    "control": (ALIKE, {**CONTROL, "distillation_weight": 0.0}),
    "paper": ("task.yaml", {"max_length": 192}),
    "late exit": (
        ALIKE,
        {"exits": [7], "fixed_exits": [22], "rotation": 1}
        | {"model": BUILT_IN, "max_steps": 1500, "learning_rate": 4e-4, "save_steps": 250},
    ),
}
EXAMPLES = ROOT / "examples"
TRAINING_ROWS = "$LAYERSKIP_DATA/topv2/*_train.tsv*"
SMOKE = {
    "steps": 2,
    "rows": 2,
    "samples": 2,
    "exits": [1, 3],
    "draft_tokens": 2,
    "dtype": "float32",
}
SMOKE_TRAINING = {
    **SMOKE_EXITS,
    "exit_layer": 1,
    "batch_size": 2,
    "precision": "float32",
    "compile": False,
    "eval_rows": 0,
    "max_length": 96,
}


def main() -> None:
    options = _options()
    record = Record("task", options, [*VARIANTS, BUILT_IN])
    if options.smoke:
        _made_up(options.work, Path(options.model))
    for variant in options.variants:
        if record.lacks(variant):
            if variant == BUILT_IN:
                source = options.model if options.smoke else BUILT_IN
                row: dict[str, Any] = {"model": source, "trained": {}}
            else:
                config = _config(variant, options)
                source = config.output
                learnt = trained(config, _tokens(config), again=options.again)
                row = {"model": config.model, "trained": learnt}
            model = LayerSkipModel.from_pretrained(source, dtype=options.dtype, weights="16bit")
            row |= {"layers": len(model.decoder.layers)}
            row |= _measured(model, source, variant, options)
            record.add(variant, row, model.decoder.kernels)


def _options() -> argparse.Namespace:
    parser = options_of(
        "task",
        "Finetuning on TOPv2.",
        "of training, for each variant: it ends then, with its learning rate",
        [*VARIANTS, BUILT_IN],
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=500, help="of all variants but late exit")
    parser.add_argument("--rows", type=int, default=2300, help="of the test, for exact match")
    parser.add_argument("--samples", type=int, default=40, help="of the test, for speed")
    parser.add_argument("--exits", type=numbers, default=[7, 15, 22])
    parser.add_argument("--draft-tokens", type=int, default=8)
    parser.set_defaults(variants=["recipe", "control", BUILT_IN, "late exit"])
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, model=str(options.work / "base"))
    return options


def _measured(
    model: LayerSkipModel, source: str, variant: str, options: argparse.Namespace
) -> dict[str, Any]:
    task = unseen(load_task("topv2", samples=options.rows), TRAINING_ROWS)
    answers = greedy_answers(model, task, mode="plain")
    quality = task.quality([answer.text for answer in answers])
    quality |= {"rows": len(task.samples)}
    if variant == "control":
        return quality
    exit_layers = options.exits[:1] if variant == BUILT_IN else options.exits
    exits = acceptance_by_exit(model, task, answers, exit_layers, options.draft_tokens)
    for row in exits:
        early = greedy_answers(model, task, mode="early-exit", exit_layer=row["exit_layer"])
        row |= task.quality([answer.text for answer in early])
    config = BenchConfig(
        modes=("self-speculative",),
        exit_layers=exit_layers,
        draft_tokens=[options.draft_tokens],
    )
    timed = bench(model, load_task("topv2", samples=options.samples), config, source=source)
    kept = (
        *("exit_layer", "draft_tokens", "speedup", "speedup_interval", "tokens_per_s"),
        *("acceptance_rate", "mean_accepted_length", "identical_to_plain"),
    )
    rows = [{name: row[name] for name in kept} for row in timed["rows"][1:]]
    plain = {"tokens_per_s": timed["rows"][0]["tokens_per_s"]}
    measured = {"draft_tokens": options.draft_tokens, **quality, "exits": exits}
    return {**measured, "plain": plain, "timed": rows}


def _config(variant: str, options: argparse.Namespace) -> TrainConfig:
    file, changes = VARIANTS[variant]
    topv2 = TrainConfig.from_yaml(EXAMPLES / ALIKE)
    settings: dict[str, Any] = {
        **{name: getattr(topv2, name) for name in ("data", "prompt", "completion", "batch_size")},
        "model": options.model,
        "max_steps": options.steps,
        "max_minutes": options.minutes,
        "output": str(options.work / variant.replace(" ", "-")),
        "keep_checkpoints": 1,
        "resume": True,
        **changes,
    }
    if options.smoke:
        settings |= {**SMOKE_TRAINING, "model": options.model, "max_steps": options.steps}
    settings["warmup_steps"] = settings["max_steps"] // 10
    return TrainConfig.from_yaml(EXAMPLES / file, **settings)


def _tokens(config: TrainConfig) -> int:
    """Of one pass over the rows that are learnt, estimated from some of them."""
    rows = [
        {"prompt": config.prompt.format_map(row), "completion": config.completion.format_map(row)}
        for _, row in read_rows(config.data)
    ]
    sample = draw(rows, 5_000, 0)
    some = tokens_of(sample, tokenizer_of(config.model), config.max_length)
    return round(some * (len(rows) - config.eval_rows) / len(sample))


def _made_up(work: Path, model: Path) -> None:
    """A tiny model, and a folder of data like TOPv2 with a few rows."""
    folder = work / "data" / "topv2"
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    for split, minutes in {"train": range(2, 12), "test": range(12, 18)}.items():
        rows = [
            f"timer\tset a timer for {i} minutes\t[IN:CREATE_TIMER [SL:DATE_TIME for {i} minutes ] ]"
            for i in minutes
        ]
        texts.append("\n".join(["domain\tutterance\tsemantic_parse", *rows, ""]))
        with lzma.open(folder / f"timer_{split}.tsv.xz", "wt", encoding="utf-8") as file:
            file.write(texts[-1])
    os.environ[DATA_VARIABLE] = str(work / "data")
    new_model(model, texts, 300, TINY, weights=True)


if __name__ == "__main__":
    run(main)
