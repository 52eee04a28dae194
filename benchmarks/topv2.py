"""What the recipe made of SmolLM2 on TOPv2, against the same finetuning without it.

    LAYERSKIP_DATA=/path/to/data layerskip train examples/topv2.yaml
    LAYERSKIP_DATA=/path/to/data layerskip train examples/topv2.yaml --output runs/topv2-control \\
        --curriculum none --fixed-exits "" --p-max 0 --distillation-weight 0
    LAYERSKIP_DATA=/path/to/data python benchmarks/topv2.py runs/topv2 runs/topv2-control

A control that was trained later is added to the file of its recipe:

    LAYERSKIP_DATA=/path/to/data python benchmarks/topv2.py --add-control runs/topv2-control \\
        --output FILE

Rows of the test split, greedy. Exact match: early exit decodes each row anew with E layers. Agreement:
the share of positions on the model's own greedy output where exit E's top token is the last layer's;
acceptance is what that output's rounds of d = 4 come to, replayed.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

from engine import deliver, environment_of, parsed, run
from rich.progress import track

from layerskip import LayerSkipModel
from layerskip.bench.tasks import Task, load_task
from layerskip.decoding import Generation
from layerskip.model import open_files, resolve
from layerskip.model.quantize import WEIGHTS
from layerskip.tune.predict import agreement_rate, read_agreement, replay

EXITS = (4, 6, 8, 10, 12, 15, 20)
DRAFT_TOKENS = 4
BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", help="checkpoint trained with the recipe")
    parser.add_argument("control", nargs="?", help="checkpoint trained without it")
    parser.add_argument(
        "--add-control", help="measure this control alone, for the file of --output"
    )
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--weights", default="16bit", choices=WEIGHTS, help="of the recipe")
    parser.add_argument("--exits", default=",".join(map(str, EXITS)))
    options = parsed(parser)
    if options.add_control and (options.recipe or not options.output):
        parser.error("--add-control needs the --output file of its recipe, and no other checkpoint")
    task = load_task("topv2", samples=options.rows, seed=0)
    if options.add_control:
        result = json.loads(options.output.read_text(encoding="utf-8"))
        asked = (len(task.samples), options.dtype)
        if (found := (result["rows"], result["environment"]["dtype"])) != asked:
            parser.error(f"{options.output} is of {found}, not of {asked}")
        result["control"] = _control(options.add_control, task, options.dtype)
    elif options.recipe:
        result = _measured(options, task)
    else:
        parser.error("name a checkpoint, or --add-control one")
    deliver(result, options.output)


def _measured(options: argparse.Namespace, task: Task) -> dict[str, Any]:
    began = time.monotonic()
    if options.control:
        open_files(resolve(options.control))  # what is missing is said before an hour of measuring
    result: dict[str, Any] = {"rows": len(task.samples), "draft_tokens": DRAFT_TOKENS}
    model = LayerSkipModel.from_pretrained(
        options.recipe, dtype=options.dtype, weights=options.weights
    )
    result["environment"] = environment_of("benchmarks/topv2.py", model)
    exits = [int(text) for text in options.exits.split(",")]
    result["recipe"] = trained_with_recipe(model, task, exits)
    if options.control:
        result["control"] = _control(options.control, task, options.dtype)
    result["minutes"] = (time.monotonic() - began) / 60
    return result


def _control(checkpoint: str, task: Task, dtype: str) -> dict[str, Any]:
    model = LayerSkipModel.from_pretrained(checkpoint, dtype=dtype)
    found = exact_match(task, answer(model, task, mode="plain"))
    return {"exact_match": found, "environment": environment_of("benchmarks/topv2.py", model)}


def trained_with_recipe(
    model: LayerSkipModel,
    task: Task,
    exits: Sequence[int] = EXITS,
    draft_tokens: int = DRAFT_TOKENS,
) -> dict[str, Any]:
    answers = answer(model, task, mode="plain")
    rows = []
    for figures in drafts_by_exit(model, task, answers, exits, draft_tokens):
        early = answer(model, task, mode="early-exit", exit_layer=figures["exit_layer"])
        rows.append({**figures, "exact_match": exact_match(task, early)})
        print(json.dumps(rows[-1]), flush=True)
    return {"exact_match": exact_match(task, answers), "exits": rows}


def drafts_by_exit(
    model: LayerSkipModel,
    task: Task,
    answers: Sequence[Generation],
    exits: Sequence[int],
    draft_tokens: int = DRAFT_TOKENS,
) -> list[dict[str, Any]]:
    """What each exit would have drafted of the model's own greedy answers; [] where they are empty."""
    limit = task.max_new_tokens
    continuations = [
        read_agreement(model.decoder, model.tokenize(sample.prompt), made.token_ids, exits, limit)
        for sample, made in track(list(zip(task.samples, answers, strict=True)), "agreement")
        if made.new_tokens > 1
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


def answer(model: LayerSkipModel, task: Task, **options: Any) -> list[Generation]:
    prompts = [sample.prompt for sample in task.samples]
    answers: list[Generation] = []
    for start in track(range(0, len(prompts), BATCH), " ".join(map(str, options.values()))):
        answers += model.generate(
            prompts[start : start + BATCH],
            max_new_tokens=task.max_new_tokens,
            stop=task.stop,
            **options,
        )
    return answers


def exact_match(task: Task, answers: list[Generation]) -> float:
    return task.quality([made.text for made in answers])["exact_match"]


if __name__ == "__main__":
    run(main)
