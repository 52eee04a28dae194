"""Measure all speed figures of a release: own modes, baselines, memory, start-up, curves.

    LAYERSKIP_DATA=data python benchmarks/speed.py --model runs/topv2 --task topv2 \
        --model smollm2-135m --task cnn_dm,spec_bench --curves --output benchmarks/results/speed.json

Each part runs as a command of its own in a fresh process, and the result is written after each; the
same command resumes an interrupted run. A part that fails is reported, and retried the next time.
A report (.md) and a plot of the curves (.png) are written beside the result. The targets are defined in
speed_targets.py.
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
from curves import draw
from speed_targets import report, target_table
from startup_memory import LAYERSKIP

from layerskip.bench.baselines import BASELINES
from layerskip.bench.tasks import FORMS
from layerskip.model import open_files, resolve
from layerskip.model.checkpoint import with_defaults
from layerskip.model.quantize import WEIGHTS

MAX_NEW_TOKENS = 128  # tasks may set a lower limit
Part = tuple[str, list[str]]
"""Name and command; `--output FILE` is appended."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    here = environment("benchmarks/speed.py", "bfloat16")
    result = {"environment": here, "parts": {}} if options.again else _begun(options.output, here)
    parts = list(_parts(options))
    for number, (name, command) in enumerate(parts, 1):
        before = result["parts"].get(name, {})
        if before.get("command") == _shown(command) and "error" not in before:
            continue
        print(f"[{number}/{len(parts)}] {name}", end=" ", flush=True)
        result["parts"][name] = part = _run(command)
        print(part.get("error", f"{part['seconds']:.0f} s"), flush=True)
        _write(options.output, result)
    _write(options.output, result)
    for target in result["goals"]:
        print(json.dumps(target))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="repeat for several")
    tasks = "tasks or files of prompts, comma-separated; once for each model"
    parser.add_argument("--task", action="append", required=True, help=tasks)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", type=comma_separated, default=list(WEIGHTS))
    parser.add_argument(
        "--peers", type=comma_separated, default=list(BASELINES), help='"" for none'
    )
    parser.add_argument(
        "--exit-layers", default="4,6,8", help="of fixed (E, d) for trained checkpoints"
    )
    parser.add_argument("--draft-tokens", default="3,5", help="of fixed (E, d)")
    parser.add_argument("--ablation", default="16bit", help="weights with ablation rows")
    parser.add_argument("--allow-code-execution", action="store_true", help="for humaneval, mbpp")
    parser.add_argument("--curves", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure all parts again")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if len(options.model) != len(options.task):
        parser.error("--task is needed once for each --model")
    for kind, names, choices in (
        ("weights", options.weights, WEIGHTS),
        ("peer", options.peers, BASELINES),
        (
            "task",
            [t for tasks in options.task for t in comma_separated(tasks) if not Path(t).is_file()],
            FORMS,
        ),
    ):
        if unknown := sorted(set(names) - set(choices)):
            parser.error(f"there is no {kind} {unknown[0]!r}; there are: {', '.join(choices)}")
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


def _parts(options: argparse.Namespace) -> Iterator[Part]:
    """Yield all parts, quick ones first."""
    cases = list(zip(options.model, options.task, strict=True))
    threads = ["--threads", str(options.threads)]
    for what in ("start-up", "memory"):
        for model, tasks in cases:
            command = ["benchmarks/startup_memory.py", what, "--model", model, *threads]
            yield f"{what} {model}", [*command, "--task", comma_separated(tasks)[0]]
    for weights in options.weights:
        for model, tasks in cases:
            for task in comma_separated(tasks):
                yield f"{model} {task} {weights}", _bench(options, model, task, weights)
    if options.curves:
        for model, tasks in cases:
            command = [
                "benchmarks/curves.py",
                "--model",
                model,
                "--task",
                comma_separated(tasks)[0],
            ]
            yield f"curves {model}", [*command, *threads, "--weights", ",".join(options.weights)]


def _bench(options: argparse.Namespace, model: str, task: str, weights: str) -> list[str]:
    """Build a bench command; fixed (E, d) only for checkpoints trained to draft by early exit."""
    is_trained = with_defaults(model, open_files(resolve(model)).settings).exit_layer is not None
    of_task = FORMS[task].max_new_tokens if task in FORMS else options.max_new_tokens
    peers = [peer for peer in options.peers if peer != "transformers" or weights == "16bit"]
    flags = {
        "model": model,
        "task": task,
        "weights": weights,
        "samples": options.samples,
        "repeats": options.repeats,
        "max-new-tokens": min(options.max_new_tokens, of_task),
        "threads": options.threads,
        "modes": "self-speculative,auto" if is_trained else "auto",
        "exit-layers": options.exit_layers,
        "draft-tokens": options.draft_tokens,
        "peers": ",".join(peers),
    }
    command = ["-c", LAYERSKIP, "bench"]
    if options.allow_code_execution:
        command.append("--allow-code-execution")
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    return [*command, "--ablation"] if weights == options.ablation else command


def _run(command: list[str]) -> dict[str, Any]:
    """Run a command; return the document it wrote, or an `error`."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="layerskip-speed-") as folder:
        file = Path(folder) / "part.json"
        done = subprocess.run(
            [sys.executable, *command, "--output", str(file)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},  # this checkout
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        head = {"command": _shown(command), "seconds": time.monotonic() - begin}
        if done.returncode or not file.is_file():
            lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            return {**head, "error": lines[-1]}
        document = json.loads(file.read_text(encoding="utf-8"))
        document["environment"].pop("command", None)  # names the temporary file
        return {**head, **document}


def _shown(command: list[str]) -> str:
    """Format a command as it would be typed."""
    is_script = command[0] != "-c"
    return shlex.join(["python", *command] if is_script else ["layerskip", *command[2:]])


def _write(output: Path, result: dict[str, Any]) -> None:
    """Write the result, the report and the plot."""
    result["goals"] = target_table(result["parts"])
    write(result, output)
    drawn = {p["model"]: p for p in result["parts"].values() if "verify_ms" in p}
    picture = output.with_suffix(".png")
    if drawn:
        draw(drawn, picture)
    output.with_suffix(".md").write_text(
        report(result, picture.name if drawn else None), encoding="utf-8"
    )


if __name__ == "__main__":
    run(main)
