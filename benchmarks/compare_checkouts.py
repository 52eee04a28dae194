"""Speed of two checkouts of layerskip, interleaved: the same prompts, weights and options in both.

Each checkout answers in a process of its own, prompt by prompt in alternating order, so that drift of
the machine affects both alike. Ratios are new over old.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import ROOT, deliver, environment, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.model.hub import TRAINED_MODEL

WORKER = """
import json, os, sys, torch
replies = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
from layerskip import LayerSkipModel
name, weights, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
model = LayerSkipModel.from_pretrained(name, dtype="bfloat16", weights=weights)
print("ready", file=replies, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    answer = model.generate(request["prompt"], **request["options"])
    reply = {"ids": answer.token_ids, "seconds": answer.decode_s, "rounds": len(answer.steps) - 1}
    print(json.dumps(reply), file=replies, flush=True)
"""


class Checkout:
    """A process that answers with the code of one checkout."""

    def __init__(self, folder: Path, model: str, weights: str, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, model, weights, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(folder / "src"),
                "OMP_NUM_THREADS": str(threads),
            },
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "ready":
            raise ValueError(f"{folder} does not answer")

    def answer(self, prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
        """Return the token ids, decoding seconds and rounds of an answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"prompt": prompt, "options": options}) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder of the other checkout")
    parser.add_argument("--model", default=TRAINED_MODEL)
    parser.add_argument("--tasks", default="topv2,spec_bench")
    parser.add_argument("--weights", default="16bit,int8")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, dtype="bfloat16")
    prompts = {
        task: [
            model.tokenize(sample.prompt)
            for sample in load_task(task, samples=options.samples, judged=False).samples
        ]
        for task in options.tasks.split(",")
    }
    rows = []
    for weights in options.weights.split(","):
        checkouts = {
            name: Checkout(folder, options.model, weights, torch.get_num_threads())
            for name, folder in (("old", options.old.resolve()), ("new", ROOT))
        }
        for task in prompts:
            for mode in ("plain", "auto"):
                row = compare(checkouts, prompts[task], mode, options)
                rows.append({"weights": weights, "task": task, "mode": mode, **row})
                print(rows[-1], flush=True)
        for checkout in checkouts.values():
            checkout.close()
    here = environment("benchmarks/compare_checkouts.py", "bfloat16", "compiled")
    deliver({"environment": here, "old_commit": commit(options.old), "rows": rows}, options.output)


def compare(
    checkouts: dict[str, Checkout],
    prompts: list[list[int]],
    mode: str,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Return tokens/s of both checkouts over all prompts, their ratio, and how many answers agree."""
    how: dict[str, Any] = {"mode": mode, "max_new_tokens": options.max_new_tokens}
    if options.temperature:
        how |= {"temperature": options.temperature, "top_p": 0.9, "seed": 0}
    for checkout in checkouts.values():  # warm-up
        checkout.answer(prompts[0], how)
    answers: dict[str, list[dict[str, Any]]] = {"old": [], "new": []}
    for i, prompt in enumerate(prompts):
        for name in ("old", "new") if i % 2 else ("new", "old"):
            answers[name].append(checkouts[name].answer(prompt, how))
    row: dict[str, Any] = {}
    for name, done in answers.items():
        tokens = sum(len(answer["ids"]) - 1 for answer in done)
        row[f"{name}_tokens_per_s"] = round(tokens / sum(a["seconds"] for a in done), 1)
        row[f"{name}_tokens_per_round"] = round(tokens / sum(a["rounds"] for a in done), 3)
    pairs = list(zip(answers["old"], answers["new"], strict=True))
    rates = [
        (old["seconds"] / max(len(old["ids"]) - 1, 1))
        / (new["seconds"] / max(len(new["ids"]) - 1, 1))
        for old, new in pairs
        if len(old["ids"]) > 4 and len(new["ids"]) > 4
    ]
    return row | {
        "ratio": round(row["new_tokens_per_s"] / row["old_tokens_per_s"], 3),
        "median_ratio": round(statistics.median(rates), 3),
        "same_answers": sum(old["ids"] == new["ids"] for old, new in pairs),
        "prompts": len(pairs),
    }


def commit(folder: Path) -> str:
    """Return the short commit of a checkout."""
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    run(main)
