"""Speed beside busy processes: with the number of threads that the kernels choose, and fixed ones.

    python benchmarks/busy_cores.py --output benchmarks/results/busy-cores.json

Reports tokens/s of plain decoding, of eight sequences together, and of the prefill of 2,048 tokens,
beside 0, 1, 2 and 4 processes that compute on one thread each. Runs are interleaved, and each begins
with all threads, as a new process does.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from common import deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.decoding.generate import PREFILL_CHUNK
from layerskip.model import Decoder
from layerskip.model.hub import DEFAULT_MODEL
from layerskip.model.native import team_size

SPIN = "while True: pass"
PREFILL_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--weights", default="16bit")
    parser.add_argument("--busy", default="0,1,2,4", help="numbers of busy processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, weights=options.weights, compile=True)
    n = options.max_new_tokens
    works = {
        "decoding": (n, partial(decode, model.decoder, 1, n)),
        "8 sequences": (8 * n, partial(decode, model.decoder, 8, n)),
        "prefill": (PREFILL_TOKENS, partial(prefill, model.decoder)),
    }
    rows = []
    for busy in map(int, options.busy.split(",")):
        with busy_processes(busy):
            for name, (n_tokens, work) in works.items():
                speeds = measure(work, n_tokens, options.threads, options.rounds)
                rows.append({"busy": busy, "work": name, "tokens/s": speeds})
                print(rows[-1], flush=True)
    environment = environment_of("benchmarks/busy_cores.py", model)
    result = {"environment": environment, "model": options.model, "rounds": options.rounds}
    deliver({**result, "rows": rows}, options.output)


def measure(work: Callable[[], None], n_tokens: int, threads: int, rounds: int) -> dict[str, float]:
    """Return the median tokens/s by choice of threads: "1", "2" (`threads`), and "chosen"."""
    choices = {"1": fixed(1), str(threads): fixed(threads), "chosen": team_size.TeamSize.choose}
    runs: dict[str, list[float]] = {choice: [] for choice in choices}
    for _ in range(1 + rounds):
        for choice, choose in choices.items():
            team_size._team_size.cache_clear()
            with mock.patch.object(team_size.TeamSize, "choose", choose):
                begin = time.perf_counter()
                work()
                runs[choice].append(n_tokens / (time.perf_counter() - begin))
    return {choice: round(statistics.median(speeds[1:]), 1) for choice, speeds in runs.items()}


def fixed(threads: int) -> Callable[[team_size.TeamSize, int], int]:
    """Return a `TeamSize.choose` that does not adapt."""
    return lambda _, maximum: min(threads, maximum)


@torch.inference_mode()
def decode(decoder: Decoder, sequences: int, n_tokens: int) -> None:
    """Decode greedily behind one token, a pass for each token."""
    cache = decoder.new_cache(n_tokens, sequences)
    tokens = torch.ones(sequences, 1, dtype=torch.int64)
    for _ in range(n_tokens):
        _, tokens, _ = decoder.greedy_step(tokens, len(decoder.layers), cache)
        cache.lengths += 1


@torch.inference_mode()
def prefill(decoder: Decoder) -> None:
    """Run a prompt through all layers, in chunks as `generate` does."""
    cache = decoder.new_cache(PREFILL_TOKENS)
    tokens = torch.ones(1, PREFILL_TOKENS, dtype=torch.int64)
    for chunk in tokens.split(PREFILL_CHUNK, dim=1):
        decoder.run(decoder.embed(chunk), 0, len(decoder.layers), cache)
        cache.lengths += chunk.shape[1]


@contextlib.contextmanager
def busy_processes(n: int) -> Iterator[None]:
    """Keep n processes computing."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(n)]
    try:
        time.sleep(1)  # they are running
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run(main)
