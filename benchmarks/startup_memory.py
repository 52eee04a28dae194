"""Measure start-up time and peak memory in fresh processes.

    python benchmarks/startup_memory.py start-up --model smollm2-135m
    LAYERSKIP_DATA=data python benchmarks/startup_memory.py memory --model runs/topv2 --task topv2

Start-up is the time from the start of a process to its last output byte, for 16 tokens: with compiled
kernels in the cache, with an empty cache (kernels are compiled first), and by part in processes that do
the same from Python. Memory is the peak resident set while prompts of a task are decoded, weights
included, in one process per mode.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.machine import PeakMemory
from layerskip.bench.tasks import load_task
from layerskip.model import resolve

RUNS = 3
PROMPTS = 8
NEW_TOKENS = 128
ANSWER_TOKENS = 16
LAYERSKIP = "from layerskip.cli import main; main()"
PARTS = {
    "Python and PyTorch": "import torch; torch.set_num_threads(int(sys.argv[2]))",
    "other modules": "import layerskip.cli.generate; from layerskip import LayerSkipModel",
    "the model": "model = LayerSkipModel.from_pretrained(sys.argv[1])",
    "the answer": f"model.generate('Hello', max_new_tokens={ANSWER_TOKENS})",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["start-up", "memory", "peak"], help="peak is internal")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="topv2")
    parser.add_argument("--mode", default="plain")
    options = parse(parser)
    if options.what == "start-up":
        result = start_up(str(resolve(options.model)), options.threads)
    elif options.what == "memory":
        result = {f"{mode} bytes": peaks(options, mode) for mode in ("plain", "auto")}
        result["over_plain"] = result["auto bytes"] / result["plain bytes"]
    else:
        print(peak(options))
        return
    model = LayerSkipModel.from_pretrained(options.model)
    result["environment"] = environment_of("benchmarks/startup_memory.py", model)
    deliver(result, options.output)


def start_up(model: str, threads: int) -> dict[str, Any]:
    """Seconds to a complete output; the first run, which reads files from disk, is not counted."""
    command = [sys.executable, "-c", LAYERSKIP, "generate", "--model", model, "--prompt", "Hello"]
    command += ["--max-new-tokens", str(ANSWER_TOKENS), "--threads", str(threads)]

    def once(cache: str | None = None) -> float:
        cache_env = {"XDG_CACHE_HOME": cache, "LAYERSKIP_CACHE": cache} if cache else {}
        begin = end = time.perf_counter()
        with subprocess.Popen(
            command,
            bufsize=0,
            env=_environment() | cache_env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            while process.stdout.read(4096):
                end = time.perf_counter()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        return end - begin

    once()
    cached = [once() for _ in range(RUNS)]
    with tempfile.TemporaryDirectory(prefix="layerskip-cache-") as empty:
        compiling = once(empty)
    return {
        "seconds": statistics.median(cached),
        "seconds_of_runs": cached,
        "seconds_with_compilation": compiling,
        "seconds_of_parts": start_parts(model, threads),
    }


def start_parts(model: str, threads: int) -> dict[str, float]:
    """Median seconds of each of PARTS, and of process exit."""
    lines = ["import sys, time"]
    for statement in PARTS.values():
        lines += [statement, "print(time.time())"]
    command = [sys.executable, "-c", "\n".join(lines), model, str(threads)]
    runs = []
    for _ in range(RUNS):
        marks = [time.time()]
        printed = subprocess.check_output(command, env=_environment(), text=True)
        marks += [*map(float, printed.split()), time.time()]
        runs.append([after - before for before, after in itertools.pairwise(marks)])
    medians = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
    return dict(zip([*PARTS, "the end"], medians, strict=True))


def _environment() -> dict[str, str]:
    """Let Python cache bytecode, as pip does for installed packages."""
    return os.environ | {"PYTHONDONTWRITEBYTECODE": ""}


def peaks(options: argparse.Namespace, mode: str) -> float:
    """Median peak over several processes."""
    command = [sys.executable, __file__, "peak", "--mode", mode, "--threads", str(options.threads)]
    command += ["--model", options.model, "--task", options.task]
    peaks = [subprocess.check_output(command, text=True).splitlines()[-1] for _ in range(RUNS)]
    return statistics.median(map(int, peaks))


def peak(options: argparse.Namespace) -> int:
    """Peak resident bytes while prompts are decoded, counted after loading."""
    model = LayerSkipModel.from_pretrained(options.model)
    task = load_task(options.task, samples=PROMPTS, chat=model.has_chat_template, judged=False)
    memory = PeakMemory(model.decoder.device)
    memory.reset()
    for sample in task.samples:
        model.generate(sample.prompt, mode=options.mode, max_new_tokens=NEW_TOKENS, stop=task.stop)
    peak_bytes = memory.read()
    if memory.scope != "row" or peak_bytes is None:
        raise SystemExit("this system cannot reset the peak memory of a process")
    return peak_bytes


if __name__ == "__main__":
    run(main)
