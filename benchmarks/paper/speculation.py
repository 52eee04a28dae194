"""Acceptance and speedup over the draft length, d = 1 to 12, of a trained checkpoint.

    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.speculation \\
        --model runs/topv2 --task topv2 --exits 4,8,15
    LAYERSKIP_DATA=/path/to/data PYTHONPATH=benchmarks python -m paper.speculation \\
        --model runs/paper/domain/recipe --task humaneval --exits 4,8,15 \\
        --allow-code-execution
    PYTHONPATH=benchmarks python -m paper.speculation \\
        --model runs/paper/pretrain/LD-EE --task held-out --exits 3,6,9

Each command adds a row to the same file. Acceptance is replayed from the greedy answers and what every
exit says along them; speed is of real decoding, all d in turns with plain decoding on each prompt. The
task `held-out` are functions of the standard library's held-out files, to be continued.
"""

import argparse
from pathlib import Path

from common import run

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from paper.checkpoints import TINY, new_model, shown, told, version, write_rows
from paper.corpus import STANDARD_LIBRARY, Corpus, functions
from paper.measures import drafting
from paper.record import Record, numbers, options_of

OWN_TASK = "held-out"
SMOKE = {"samples": 2, "exits": [1, 3], "draft_tokens": [1, 2], "max_new_tokens": 8}


def main() -> None:
    options = _options()
    model_name, task_name, exits = options.model, options.task, options.exits
    del options.model, options.task, options.exits  # rows of several checkpoints share a file
    record = Record("speculation", options)
    folder = Path(model_name)
    if options.smoke or task_name == OWN_TASK:
        corpus = Corpus.of([STANDARD_LIBRARY], 200_000 if options.smoke else None)
        prompts = write_rows(options.work / f"{OWN_TASK}.jsonl", _prompts(corpus))
    if options.smoke:
        new_model(folder, corpus.train, 300, TINY, weights=True)
    variant = f"{shown(folder)} on {task_name}"
    if not record.lacks(variant):
        print(f"speculation: {variant} was measured already; --again measures it anew")
        return
    model = LayerSkipModel.from_pretrained(model_name, dtype=options.dtype)
    task = load_task(
        str(prompts) if task_name == OWN_TASK else task_name,
        samples=options.samples,
        allow_code_execution=options.allow_code_execution,
    )
    row = drafting(
        model,
        task,
        model_name,
        exits=exits,
        timed_exits=exits,
        draft_tokens=options.draft_tokens,
        max_new_tokens=options.max_new_tokens,
        repeats=options.repeats,
    )
    row |= {"model": shown(folder), "task": task_name, "trained": told(folder)}
    row |= {"layers": len(model.decoder.layers), "version": version(model_name)}
    record.add(variant, row, model.decoder.kernels)


def _options() -> argparse.Namespace:
    parser = options_of(
        "speculation", "Acceptance and speedup over the draft length.", argparse.SUPPRESS
    )
    parser.add_argument("--model", default="smollm2-135m", help="a trained checkpoint")
    parser.add_argument("--task", default=OWN_TASK, help=f"as for `layerskip bench`, or {OWN_TASK}")
    parser.add_argument("--allow-code-execution", action="store_true", help="for humaneval, mbpp")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--exits", type=numbers, default=[4, 8, 15])
    parser.add_argument("--draft-tokens", type=numbers, default=list(range(1, 13)))
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    if options.smoke:
        base = str(options.work / "base")
        vars(options).update(SMOKE, model=base, task=OWN_TASK, dtype="float32")
    return options


def _prompts(corpus: Corpus) -> list[dict[str, str]]:
    """Functions to be continued; without their bodies, which are no answers to compare with."""
    return [{"prompt": row["prompt"]} for row in functions(corpus.held_out)]


if __name__ == "__main__":
    run(main)
