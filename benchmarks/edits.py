"""Task `edits`, where most of an answer stands in the prompt: speed of mode auto by draft source.

With --cpu-seconds the clock counts the CPU seconds of this process, for machines that other programs
share; take one thread then, since waiting threads spin.
"""

import argparse
import contextlib

from common import cpu_clock, deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.bench import bench
from layerskip.bench.systems import BenchConfig
from layerskip.bench.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", default="16bit")
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--sources", action="store_true", help="rows for each source of drafts")
    parser.add_argument("--cpu-seconds", action="store_true")
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, dtype="bfloat16", weights=options.weights)
    config = BenchConfig(
        task="edits",
        modes=("auto",),
        sources=options.sources,
        max_new_tokens=options.max_new_tokens,
    )
    task = load_task("edits", samples=options.samples, chat=True)
    with cpu_clock() if options.cpu_seconds else contextlib.nullcontext():
        document = bench(model, task, config, source=options.model)
    clock = "CPU seconds" if options.cpu_seconds else "seconds"
    environment = environment_of("benchmarks/edits.py", model)
    deliver({**document, "environment": environment, "clock": clock}, options.output)


if __name__ == "__main__":
    run(main)
