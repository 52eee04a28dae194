"""Measure a trained checkpoint: task quality, draft acceptance of every exit, perplexity.

    LAYERSKIP_DATA=/path/to/data python benchmarks/checkpoint.py runs/topv2 topv2 \\
        --early-exit --rows 2300 --exits 4,8 \\
        --unseen '$LAYERSKIP_DATA/topv2/*_train.tsv*' --output benchmarks/results/topv2-checkpoint.json

The held-out rows are a task of `layerskip bench`, or a folder with one file `test-NAME.jsonl` for each
task. If NAME is a task of `layerskip bench`, that task is used, so that its results compare with others.

The last layer's greedy outputs are judged. Along them, the agreement of every exit with the last layer
is read, and rounds of d = 4 drafted tokens are replayed. --early-exit also judges the outputs of early
exit alone. --unseen leaves out prompts that the training rows contain, but for case and spaces.
A control, trained without the recipe, is measured by itself with --exits none. The settings and log of
the training run are copied into the result.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import comma_separated, deliver, environment_of, parse, run
from rich.progress import track

from layerskip import LayerSkipModel
from layerskip.bench.perplexity import perplexity
from layerskip.bench.tasks import TASKS, Task, load_task
from layerskip.data.readers import WIKITEXT, read_rows, read_text
from layerskip.decoding import Generation
from layerskip.model.quantize import WEIGHTS
from layerskip.training.callbacks import read_log
from layerskip.tune.predict import agreement_rate, read_agreement, replay

EXITS = (4, 6, 8, 10, 12, 15, 20)
DRAFT_TOKENS = 4
BATCH_SIZE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="trained checkpoint")
    parser.add_argument("held_out", type=Path, help="folder of test-NAME.jsonl, or a task")
    parser.add_argument("--rows", type=int, default=200, help="of each task")
    parser.add_argument("--unseen", help="training rows of TOPv2, whose utterances are left out")
    parser.add_argument("--exits", type=_exits, default=EXITS, help="comma-separated, or none")
    parser.add_argument("--early-exit", action="store_true", help="judge early exit alone as well")
    parser.add_argument("--words", type=int, default=20000, help="of the text for perplexity")
    parser.add_argument("--text", default=WIKITEXT.folder, help="text file, or wikitext2")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weights", default="16bit", choices=WEIGHTS)
    options = parse(parser, output_required=True)
    deliver(measure(options), options.output)


def _exits(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(map(int, comma_separated(text)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure a checkpoint: quality, acceptance and perplexity, with the settings of its training.

    Raises:
        ValueError: there are no held-out rows, or the checkpoint cannot be loaded.
    """
    tasks = held_out_tasks(options.held_out, options.rows)
    if options.unseen:
        tasks = {name: unseen(task, options.unseen) for name, task in tasks.items()}
    text = read_text(options.text, options.words)
    name = options.checkpoint
    model = LayerSkipModel.from_pretrained(name, dtype=options.dtype, weights=options.weights)
    return {
        "draft_tokens": DRAFT_TOKENS,
        "text": {"name": options.text, "words": len(text.split())},
        "environment": environment_of("benchmarks/checkpoint.py", model),
        "checkpoint": {
            "name": name,
            "training": training_record(Path(name)),
            **evaluate(model, tasks, text, options.exits, early_exit=options.early_exit),
        },
    }


def held_out_tasks(held_out: Path, rows: int) -> dict[str, Task]:
    """Load the tasks of a folder, or the task of this name."""
    if str(held_out) in TASKS:
        return {str(held_out): load_task(str(held_out), samples=rows, seed=0)}
    files = {f.stem.removeprefix("test-"): f for f in sorted(held_out.glob("test-*.jsonl"))}
    if not files:
        raise ValueError(f"{held_out} has no test-NAME.jsonl")
    return {
        name: load_task(name if name in TASKS else str(file), samples=rows, seed=0)
        for name, file in files.items()
    }


def unseen(task: Task, training_rows: str) -> Task:
    """Leave out prompts that are an utterance of the training rows, but for case and spaces."""
    seen = {_normalized(fields["utterance"]) for _, fields in read_rows(training_rows)}
    kept = tuple(s for s in task.samples if _normalized(str(s.prompt)) not in seen)
    return dataclasses.replace(task, samples=kept)


def _normalized(text: str) -> str:
    return " ".join(text.casefold().split())


def evaluate(
    model: LayerSkipModel,
    tasks: dict[str, Task],
    text: str,
    exits: Sequence[int],
    *,
    early_exit: bool = False,
) -> dict[str, Any]:
    """Measure quality, acceptance of each exit, and perplexity of the last layer."""
    num_layers = len(model.decoder.layers)
    exits = [e for e in exits if e < num_layers]
    results: dict[str, Any] = {}
    for name, task in tasks.items():
        answers = greedy_answers(model, task, mode="plain")
        results[name] = {
            "samples": len(task.samples),
            "new_tokens": sum(answer.new_tokens for answer in answers),
            "quality": task.quality([answer.text for answer in answers]),
        }
        if exits:
            rows = acceptance_by_exit(model, task, answers, exits)
            results[name]["exits"] = rows
            for row in rows if early_exit else ():
                early = greedy_answers(model, task, mode="early-exit", exit_layer=row["exit_layer"])
                row |= task.quality([answer.text for answer in early])
    metrics = perplexity(model, text, [num_layers])[num_layers]
    return {
        "layers": num_layers,
        "exit_layer": model.settings.exit_layer,
        "tasks": results,
        "perplexity": {name: metric.value for name, metric in metrics.items()},
    }


def greedy_answers(model: LayerSkipModel, task: Task, **options: Any) -> list[Generation]:
    """Decode all prompts of a task greedily in batches."""
    prompts = [sample.prompt for sample in task.samples]
    answers: list[Generation] = []
    for start in track(range(0, len(prompts), BATCH_SIZE), " ".join(map(str, options.values()))):
        answers += model.generate(
            prompts[start : start + BATCH_SIZE],
            max_new_tokens=task.max_new_tokens,
            stop=task.stop,
            **options,
        )
    return answers


def acceptance_by_exit(
    model: LayerSkipModel,
    task: Task,
    answers: Sequence[Generation],
    exits: Sequence[int],
    draft_tokens: int = DRAFT_TOKENS,
) -> list[dict[str, Any]]:
    """Agreement and acceptance of each exit along the model's greedy outputs; [] if all are empty."""
    continuations = [
        read_agreement(
            model.decoder,
            model.tokenize(sample.prompt),
            answer.token_ids,
            exits,
            task.max_new_tokens,
        )
        for sample, answer in track(list(zip(task.samples, answers, strict=True)), "agreement")
        if answer.new_tokens > 1
    ]
    rows = []
    for exit_layer in exits if continuations else ():
        rounds = [r for c in continuations for r in replay(c, exit_layer, draft_tokens)]
        rows.append(
            {
                "exit_layer": exit_layer,
                "agreement": agreement_rate(continuations, exit_layer),
                "acceptance_rate": sum(r.accepted for r in rounds) / sum(r.drafted for r in rounds),
                "mean_accepted_length": sum(len(r.tokens) for r in rounds) / len(rounds),
            }
        )
    return rows


def training_record(folder: Path) -> dict[str, Any] | None:
    """Return settings and totals of the run that wrote a checkpoint; None without a record.

    `before` is the run that wrote the checkpoint it started from, if there was one.
    """
    file = folder / "train.json"
    if not file.exists():
        return None
    settings = json.loads(file.read_text(encoding="utf-8"))
    logs = read_log(folder / "train_log.jsonl")
    last = {name: value for log in logs for name, value in log.items()}
    totals = ("step", "train_runtime", "peak_memory_bytes")
    del settings["output"]  # a folder of one machine
    record = {"settings": settings, **{name: last[name] for name in totals if name in last}}
    before = training_record(Path(settings["model"]))
    return record if before is None else {**record, "before": before}


if __name__ == "__main__":
    run(main)
