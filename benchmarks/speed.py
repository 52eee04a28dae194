"""Measure the speed of checkpoints: own modes, each draft source alone, and the baselines.

    LAYERSKIP_DATA=data python benchmarks/speed.py --model smollm2-135m-topv2 --task topv2 \\
        --output benchmarks/results/topv2-speed.json

Each kind of weights of each task is one `layerskip bench --sources` in a fresh process. The result is
written after each; the same command resumes an interrupted run, and retries parts that failed.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, comma_separated, environment, run, write

from layerskip.bench.baselines import BASELINES
from layerskip.bench.tasks import FORMS, check_task
from layerskip.model import open_files, resolve
from layerskip.model.checkpoint import with_defaults
from layerskip.model.quantize import WEIGHTS

LAYERSKIP = "from layerskip.cli import main; main()"
MAX_NEW_TOKENS = 128  # tasks may set a lower limit


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    here = environment("benchmarks/speed.py", "bfloat16")
    result = {"environment": here, "parts": {}} if options.again else _begun(options.output, here)
    for name, words in _parts(options):
        command = shlex.join(["layerskip", "bench", *words])
        before = result["parts"].get(name, {})
        if before.get("command") == command and "error" not in before:
            continue
        print(name, end=" ", flush=True)
        result["parts"][name] = part = {"command": command, **_run(words)}
        print(part.get("error", f"{part['seconds']:.0f} s"), flush=True)
        write(result, options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="repeat for several")
    tasks = "tasks or files of prompts, comma-separated; once for each model"
    parser.add_argument("--task", action="append", required=True, help=tasks)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=comma_separated, default=["16bit", "int8", "int4"])
    parser.add_argument(
        "--baselines", type=comma_separated, default=list(BASELINES), help='"" for none'
    )
    parser.add_argument(
        "--exit-layers", help="of a row with a fixed (E, d), for trained checkpoints"
    )
    parser.add_argument("--draft-tokens", help="of that row")
    parser.add_argument("--allow-code-execution", action="store_true", help="for humaneval, mbpp")
    parser.add_argument("--again", action="store_true", help="measure all parts again")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if len(options.model) != len(options.task):
        parser.error("--task is needed once for each --model")
    for kind, names, choices in (
        ("weights", options.weights, WEIGHTS),
        ("baseline", options.baselines, BASELINES),
    ):
        if unknown := sorted(set(names) - set(choices)):
            parser.error(f"there is no {kind} {unknown[0]!r}; there are: {', '.join(choices)}")
    for task in comma_separated(",".join(options.task)):
        check_task(task, judged=True, allow_code_execution=options.allow_code_execution)
    return options


def _begun(output: Path, here: dict[str, Any]) -> dict[str, Any]:
    """Return the existing result if it is from the same software and machine, else a new one."""
    new: dict[str, Any] = {"environment": here, "parts": {}}
    if not output.is_file():
        return new
    old: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    for key in sorted(here.keys() - {"command", "date"}):
        if old["environment"].get(key) != here[key]:
            sys.exit(f"{output} was measured with another {key}; --again starts over")
    return new | {"parts": old["parts"]}


def _parts(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the words of each `layerskip bench`."""
    for weights in options.weights:
        for model, tasks in zip(options.model, options.task, strict=True):
            for task in comma_separated(tasks):
                yield f"{model} {task} {weights}", _bench(options, model, task, weights)


def _bench(options: argparse.Namespace, model: str, task: str, weights: str) -> list[str]:
    """Return the words of a bench command; a fixed (E, d) only for checkpoints with a trained exit."""
    is_trained = with_defaults(model, open_files(resolve(model)).settings).exit_layer is not None
    of_task = FORMS[task].max_new_tokens if task in FORMS else options.max_new_tokens
    # transformers measures in --dtype, whatever the weights.
    baselines = [b for b in options.baselines if b != "transformers" or weights == "16bit"]
    flags = {
        "model": model,
        "task": task,
        "weights": weights,
        "samples": options.samples,
        "max-new-tokens": min(options.max_new_tokens, of_task),
        "threads": options.threads,
        "modes": "self-speculative,auto" if is_trained else "auto",
        "exit-layers": options.exit_layers,
        "draft-tokens": options.draft_tokens,
        "baselines": ",".join(baselines),
    }
    words = [word for key, value in flags.items() if value for word in (f"--{key}", str(value))]
    return [*words, "--sources", *["--allow-code-execution"] * options.allow_code_execution]


def _run(words: list[str]) -> dict[str, Any]:
    """Run `layerskip bench`; return the document that it wrote, or an `error`."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="layerskip-speed-") as folder:
        file = Path(folder) / "part.json"
        done = subprocess.run(
            [sys.executable, "-c", LAYERSKIP, "bench", *words, "--output", str(file)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},  # this checkout
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds = time.monotonic() - begin
        if done.returncode or not file.is_file():
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            return {"seconds": seconds, "error": lines[-1]}
        document = json.loads(file.read_text(encoding="utf-8"))
        document["environment"].pop("command", None)  # names the temporary file
        for row in document["rows"]:
            row.pop("categories", None)  # too few prompts each
        return {"seconds": seconds, **document}


if __name__ == "__main__":
    run(main)
