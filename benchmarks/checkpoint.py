"""What a checkpoint trained on several tasks came to: quality, drafts of each exit, perplexity.

    LAYERSKIP_DATA=/path/to/data python benchmarks/checkpoint.py runs/checkpoint runs/mixture \\
        --control runs/checkpoint-control --output card.json
    python benchmarks/checkpoint_card.py card.json > MODEL_CARD.md

The folder (of examples/checkpoint/prepare.py, or your own) holds the rows that were held back:
`test-NAME.jsonl`, each a task. Where NAME is a task of `layerskip bench` (test-topv2.jsonl), that task
is asked, so that its figures compare with others. Greedy answers of the whole model are judged; along
them each exit's agreement with the last layer is read, and rounds of d = 4 are replayed, as in topv2.py.
A control is another checkpoint, asked the same; its exits are not looked at. The settings and log of
training and the mixture's own record are put into the result, for the card.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import deliver, environment_of, parsed, run
from topv2 import DRAFT_TOKENS, answer, drafts_by_exit

from layerskip import LayerSkipModel
from layerskip.bench.perplexity import perplexity
from layerskip.bench.tasks import TASKS, Task, load_task
from layerskip.data.readers import WIKITEXT, read_text
from layerskip.model import open_files, resolve
from layerskip.training.callbacks import read_log

EXITS = (4, 6, 8, 10, 12, 15, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint trained with the recipe")
    parser.add_argument("held_out", type=Path, help="folder of test-NAME.jsonl")
    parser.add_argument("--control", help="checkpoint to compare with, such as one without it")
    parser.add_argument("--rows", type=int, default=200, help="of each task")
    parser.add_argument("--words", type=int, default=20000, help="of the text to predict")
    parser.add_argument("--text", default=WIKITEXT.folder, help="text file, or wikitext2")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parsed(parser, writes_always=True)
    deliver(measure(options), options.output)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both checkpoints, one after the other, on the same prompts and text.

    Raises:
        ValueError: there is no file of prompts, or something cannot be loaded.
    """
    tasks = held_out_tasks(options.held_out, options.rows)
    text = read_text(options.text, options.words)
    if options.control:
        open_files(resolve(options.control))  # what is missing is said before an hour of measuring
    model = LayerSkipModel.from_pretrained(options.checkpoint, dtype=options.dtype)
    result: dict[str, Any] = {
        "environment": environment_of("benchmarks/checkpoint.py", model),
        "draft_tokens": DRAFT_TOKENS,
        "text": {"name": options.text, "words": len(text.split())},
        "mixture": _json_of(options.held_out / "mixture.json"),
        "checkpoint": {
            "name": options.checkpoint,
            "training": training_of(Path(options.checkpoint)),
            **figures(model, tasks, text, EXITS),
        },
    }
    del model
    if options.control:
        control = LayerSkipModel.from_pretrained(options.control, dtype=options.dtype)
        result["control"] = {
            "name": options.control,
            "training": training_of(Path(options.control)),
            **figures(control, tasks, text, ()),
        }
    return result


def held_out_tasks(folder: Path, rows: int) -> dict[str, Task]:
    """The tasks whose rows are in the folder, by name."""
    files = {f.stem.removeprefix("test-"): f for f in sorted(folder.glob("test-*.jsonl"))}
    if not files:
        raise ValueError(f"{folder} has no test-NAME.jsonl")
    return {
        name: load_task(name if name in TASKS else str(file), samples=rows, seed=0)
        for name, file in files.items()
    }


def figures(
    model: LayerSkipModel, tasks: dict[str, Task], text: str, exits: Sequence[int]
) -> dict[str, Any]:
    """Quality of the whole model on each task, what the exits would have drafted, and perplexity."""
    layers = len(model.decoder.layers)
    earlier = [e for e in exits if e < layers]
    found: dict[str, Any] = {}
    for name, task in tasks.items():
        answers = answer(model, task, mode="plain")
        found[name] = {
            "samples": len(task.samples),
            "new_tokens": sum(made.new_tokens for made in answers),
            "quality": task.quality([made.text for made in answers]),
        }
        if earlier:
            found[name]["exits"] = drafts_by_exit(model, task, answers, earlier)
    predicted = perplexity(model, text, [layers])[layers]
    return {
        "layers": layers,
        "exit_layer": model.settings.exit_layer,
        "tasks": found,
        "perplexity": {name: metric.value for name, metric in predicted.items()},
    }


def training_of(folder: Path) -> dict[str, Any] | None:
    """Settings and totals of the run that wrote a checkpoint; None where there is no record of one.

    Where it began with the checkpoint of another run, that one's are its `before`; `mixture` is what
    stands beside its rows, `average` what examples/checkpoint/average.py did to it afterwards.
    """
    settings = _json_of(folder / "train.json")
    if settings is None:
        return None
    logs = read_log(folder / "train_log.jsonl")
    last = {name: value for log in logs for name, value in log.items()}
    totals = ("step", "train_runtime", "peak_memory_bytes")
    found = {"settings": settings, **{name: last[name] for name in totals if name in last}}
    further = {
        "average": _json_of(folder / "average.json"),
        "mixture": _json_of(Path(settings["data"]).parent / "mixture.json"),
        "before": training_of(Path(settings["model"])),
    }
    return found | {name: value for name, value in further.items() if value is not None}


def _json_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    run(main)
