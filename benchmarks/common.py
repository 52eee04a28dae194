"""Helpers shared by the benchmark scripts: environment, interleaved timing, writing a result."""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from layerskip import LayerSkipModel
from layerskip.bench import machine
from layerskip.fileio import replace
from layerskip.model import Decoder, KVCache

K = TypeVar("K", bound=Hashable)
ROOT = Path(__file__).resolve().parents[1]
VERIFY_CONTEXT = 192  # positions in the cache before a timed pass


def environment(
    script: str,
    dtype: str,
    kernels: str | None = None,
    device: str = "cpu",
    weights: str = "16bit",
) -> dict[str, Any]:
    """Describe the command, the commit and the machine of a result.

    Args:
        script: path of the script in the repository, or "-m module".
        dtype: name of a torch dtype.
        kernels: `Decoder.kernels`; None where a script measures several or none.
        device: "cpu" or "cuda".
        weights: `Decoder.weights`, or a comma-separated list.
    """
    details = machine.environment(
        dtype=getattr(torch, dtype), weights=weights, device=device, kernels=kernels or "pytorch"
    )
    command = shlex.join(["python", *script.split(), *sys.argv[1:]])
    return {"command": command, "commit": machine.commit(), **details, "kernels": kernels}


def environment_of(
    script: str, model: LayerSkipModel, weights: str | None = None
) -> dict[str, Any]:
    """`environment` with the dtype, kernels and weights of a model."""
    decoder = model.decoder
    return environment(
        script, decoder.dtype_name, decoder.kernels, weights=weights or decoder.weights
    )


def interleaved(
    measurements: Mapping[K, Callable[[], float]], rounds: int, *, warm_ups: int = 1
) -> dict[K, float]:
    """Return the median of each measurement.

    Every round takes each measurement once, so that drift of the machine affects all of them alike.
    Warm-up rounds are not counted.
    """
    for measure in [*measurements.values()] * warm_ups:
        measure()
    runs = [{name: measure() for name, measure in measurements.items()} for _ in range(rounds)]
    return {name: statistics.median(run[name] for run in runs) for name in measurements}


def ms_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Wall-clock milliseconds of one call on the CPU."""
    start = time.perf_counter()
    function(*arguments)
    return 1e3 * (time.perf_counter() - start)


def llama_bench(
    program: str, file: Path, threads: int, *options: str, flash_attention: bool = True
) -> list[dict[str, Any]]:
    """Return the results of llama.cpp's own benchmark."""
    command = [program, "-m", str(file), "-t", str(threads), "-fa", str(int(flash_attention))]
    command += ["-o", "json", *options]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    results: list[dict[str, Any]] = json.loads(answer.stdout)
    return results


@torch.inference_mode()
def verify(decoder: Decoder, cache: KVCache, n_positions: int) -> None:
    """Run all layers and the head over n positions after VERIFY_CONTEXT others."""
    cache.lengths.fill_(VERIFY_CONTEXT)
    tokens = torch.zeros(1, n_positions, dtype=torch.int64)
    decoder.logits(decoder.run(decoder.embed(tokens), 0, len(decoder.layers), cache))


def parse(parser: argparse.ArgumentParser, *, output_required: bool = False) -> argparse.Namespace:
    """Parse the command line with --threads and --output added, and set the number of threads."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=output_required, help="result file (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def comma_separated(text: str) -> list[str]:
    """Split an option's value at commas; empty parts are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def deliver(result: dict[str, Any], output: Path | None) -> None:
    """Print a result and, if `output` is given, write it there."""
    print(json.dumps(result, indent=2))
    if output:
        write(result, output)


def write(result: dict[str, Any], output: Path) -> None:
    """Write a result file atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    replace(output, f"{json.dumps(result, indent=2)}\n".encode())


def run(main: Callable[[], None]) -> None:
    """Run a script; expected errors end it with one line."""
    try:
        main()
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")
