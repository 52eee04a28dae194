"""Continuous batching: tokens/s of all rows together, mode auto against plain batching.

A closed loop: so many rows at a time, and the next prompt joins when one ends. Runs are interleaved. One
row is also measured through `generate`.
"""

import argparse
import statistics
import time
from typing import Any

from common import deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.decoding.batch import Batch
from layerskip.decoding.generate import Row
from layerskip.model.hub import DEFAULT_MODEL, TRAINED_MODEL

PAIRS = f"{TRAINED_MODEL}:topv2,{DEFAULT_MODEL}:spec_bench"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", default=PAIRS, help="MODEL:TASK, separated by commas")
    parser.add_argument("--rows", default="1,4,8")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    options = parse(parser)
    results = []
    for pair in options.pairs.split(","):
        name, task = pair.split(":")
        model = LayerSkipModel.from_pretrained(name, dtype="bfloat16")
        samples = load_task(task, samples=options.samples, judged=False).samples
        prompts = [model.tokenize(sample.prompt) for sample in samples]
        for n in map(int, options.rows.split(",")):
            results.append(
                {"model": name, "task": task, "rows": n, **measure(model, prompts, n, options)}
            )
            print(results[-1], flush=True)
    here = environment_of("benchmarks/batching.py", model)
    deliver({"environment": here, "results": results}, options.output)


def measure(
    model: LayerSkipModel, prompts: list[list[int]], n: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return tokens/s of both modes, and the median ratio of neighbouring runs."""
    speeds: dict[str, list[float]] = {"plain": [], "auto": []}
    if n == 1:
        speeds["generate"] = []
    answers = {mode: tokens_per_s(model, prompts[:n], n, mode, options)[1] for mode in speeds}
    for _ in range(options.repeats):
        for mode, runs in speeds.items():
            speed, answers[mode] = tokens_per_s(model, prompts, n, mode, options)
            runs.append(speed)
    ratios = [a / p for a, p in zip(speeds["auto"], speeds["plain"], strict=True)]
    result: dict[str, Any] = {
        f"{k}_tokens_per_s": round(statistics.median(v), 1) for k, v in speeds.items()
    }
    equal = sum(a == p for a, p in zip(answers["auto"], answers["plain"], strict=True))
    return {
        **result,
        "auto_over_plain": round(statistics.median(ratios), 3),
        "equal_answers": equal,
    }


def tokens_per_s(
    model: LayerSkipModel, prompts: list[list[int]], n: int, mode: str, options: argparse.Namespace
) -> tuple[float, list[list[int]]]:
    """Return the new tokens of all prompts a second, and the answers."""
    start, limit = time.perf_counter(), options.max_new_tokens
    if mode == "generate":
        answers = [model.generate(p, max_new_tokens=limit).token_ids for p in prompts]
    else:
        config = model.resolve(mode=mode, max_new_tokens=limit)
        measured = model.settings.measured
        batch = Batch(model.decoder, max_num_seqs=n, measured=measured)
        ends = model.eos_token_ids(config)
        rows = [
            Row(
                model.decoder,
                p,
                config,
                eos_token_ids=ends,
                measured=measured,
                adapter=model.adapter,
            )
            for p in prompts
        ]
        by_row: dict[Row, list[int]] = {row: [] for row in rows}
        for row in rows:
            batch.add(row)
        for output in batch:
            if output.step is None:
                raise RuntimeError("a row has failed") from output.error
            by_row[output.row] += output.step.tokens
        answers = list(by_row.values())
    return sum(map(len, answers)) / (time.perf_counter() - start), answers


if __name__ == "__main__":
    run(main)
