"""Memory and time of loading a large checkpoint: one with the shape of Llama-3.2-1B, random weights.

    python benchmarks/loading.py --output benchmarks/results/loading.json

Every way of loading runs in a process of its own, which samples its own memory (RssAnon: what it has
allocated, without pages of mapped files, which the system takes back when it needs them). The peak over
what was there before is set against the bytes of the loaded weights.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from engine import deliver, environment, run
from safetensors.torch import save_file

SHARD_LAYERS = 4
WAYS = {
    "16bit": [],
    "int8": ["--weights", "int8"],
    "int4": ["--weights", "int4"],
    "16bit, PyTorch": ["--no-compile"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--load", type=Path, help="load this checkpoint and report; for itself")
    parser.add_argument("--weights", default="16bit")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(loaded(options.load, options.weights, not options.no_compile)))
        return
    result: dict[str, Any] = {"environment": environment("benchmarks/loading.py", "bfloat16")}
    with tempfile.TemporaryDirectory(prefix="layerskip-loading-") as folder:
        write_checkpoint(Path(folder))
        result["checkpoint_bytes"] = sum(p.stat().st_size for p in Path(folder).iterdir())
        result["rows"] = {name: in_a_process(Path(folder), how) for name, how in WAYS.items()}
    deliver(result, options.output)


def write_checkpoint(folder: Path) -> None:
    """Sharded safetensors, written a few layers at a time."""
    # Here alone: with them comes all of transformers' Llama, which is not to be in what is measured.
    from shapes import RandomTensors, config_of

    config = config_of("llama-3.2-1b")
    tensors = RandomTensors(config, torch.device("cpu"))
    shards = defaultdict[int, list[str]](list)
    for name in sorted(tensors.names() - {"lm_head.weight"}):  # which is the embedding
        layer = re.search(r"\.layers\.(\d+)\.", name)
        shards[1 + int(layer[1]) // SHARD_LAYERS if layer else 0].append(name)
    weight_map = {}
    for number, names in shards.items():
        file = f"model-{number}.safetensors"
        save_file({name: tensors.read(name) for name in names}, folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)


def in_a_process(folder: Path, how: list[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--load", str(folder), *how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def loaded(folder: Path, weights: str, compiled: bool) -> dict[str, Any]:
    """Load once; the peak is sampled every few milliseconds."""
    import transformers.models.llama.configuration_llama  # noqa: F401  what it imports is no weight

    from layerskip.model import load, native

    if compiled:
        native.prepare()
    before, peak, done = allocated(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, allocated())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    decoder = load(folder, dtype=torch.bfloat16, weights=weights, compiled=compiled).decoder
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    kept = allocated() - before
    held = decoder.weight_bytes
    return {
        "kernels": decoder.kernels,
        "weight_bytes": held,
        "kept_bytes": kept,
        "peak_bytes": peak - before,
        "peak_over_weights": (peak - before) / held,
        "seconds": seconds,
    }


def allocated() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    run(main)
