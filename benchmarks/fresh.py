"""What only a fresh process shows: how long it takes to a first answer, and how much memory it needs.

    python benchmarks/fresh.py start-up --model smollm2-135m
    LAYERSKIP_DATA=data python benchmarks/fresh.py memory --model runs/topv2 --task topv2

Start-up is from the start of a process to the end of its answer, 16 tokens: with the compiled kernels in
the cache, and with none, so that they are compiled first; and by parts, in processes that do the same
from Python. (Files older than start-up-parts-*.json count the end of the process too.) Memory is the
peak that is resident while prompts of a task are answered, the weights included, each way in a process
of its own.
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

from engine import deliver, environment_of, parsed, run

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
    parser.add_argument("what", choices=["start-up", "memory", "peak"], help="peak: for itself")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="topv2")
    parser.add_argument("--mode", default="plain")
    options = parsed(parser)
    if options.what == "start-up":
        result = start_up(str(resolve(options.model)), options.threads)
    elif options.what == "memory":
        result = {f"{mode} bytes": peaks(options, mode) for mode in ("plain", "auto")}
        result["over_plain"] = result["auto bytes"] / result["plain bytes"]
    else:
        print(peak(options))
        return
    model = LayerSkipModel.from_pretrained(options.model)
    result["environment"] = environment_of("benchmarks/fresh.py", model)
    deliver(result, options.output)


def start_up(model: str, threads: int) -> dict[str, Any]:
    """Seconds to whole answers; the first run is left out, since it reads the files from the disk."""
    command = [sys.executable, "-c", LAYERSKIP, "generate", "--model", model, "--prompt", "Hello"]
    command += ["--max-new-tokens", str(ANSWER_TOKENS), "--threads", str(threads)]

    def once(cache: str | None = None) -> float:
        moved = {"XDG_CACHE_HOME": cache, "LAYERSKIP_CACHE": cache} if cache else {}
        begin = end = time.perf_counter()
        with subprocess.Popen(
            command,
            bufsize=0,
            env=_environment() | moved,
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
    """Median seconds of each of PARTS, and of the process's end."""
    lines = ["import sys, time"]
    for statement in PARTS.values():
        lines += [statement, "print(time.time())"]
    command = [sys.executable, "-c", "\n".join(lines), model, str(threads)]
    runs = []
    for _ in range(RUNS):
        marks = [time.time()]
        said = subprocess.check_output(command, env=_environment(), text=True)
        marks += [*map(float, said.split()), time.time()]
        runs.append([after - before for before, after in itertools.pairwise(marks)])
    medians = (statistics.median(seconds) for seconds in zip(*runs, strict=True))
    return dict(zip([*PARTS, "the end"], medians, strict=True))


def _environment() -> dict[str, str]:
    """Modules of a checkout are compiled once, as pip does it, whatever is set here."""
    return os.environ | {"PYTHONDONTWRITEBYTECODE": ""}


def peaks(options: argparse.Namespace, mode: str) -> float:
    """Median of several processes."""
    command = [sys.executable, __file__, "peak", "--mode", mode, "--threads", str(options.threads)]
    command += ["--model", options.model, "--task", options.task]
    found = [subprocess.check_output(command, text=True).splitlines()[-1] for _ in range(RUNS)]
    return statistics.median(int(line) for line in found)


def peak(options: argparse.Namespace) -> int:
    """Bytes resident at most while prompts are answered, from after loading on."""
    model = LayerSkipModel.from_pretrained(options.model)
    task = load_task(options.task, samples=PROMPTS, chat=model.has_chat_template, judged=False)
    memory = PeakMemory(model.decoder.device)
    memory.reset()
    for sample in task.samples:
        model.generate(sample.prompt, mode=options.mode, max_new_tokens=NEW_TOKENS, stop=task.stop)
    found = memory.read()
    if memory.scope != "row" or found is None:
        raise SystemExit("this system does not tell the peak since a process has loaded its model")
    return found


if __name__ == "__main__":
    run(main)
