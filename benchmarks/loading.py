"""Memory and time of loading a large checkpoint: one with the shape of Llama-3.2-1B, random weights.

    python benchmarks/loading.py --output benchmarks/results/loading.json

Every way of loading runs in a process of its own, which samples its own memory (RssAnon: what it has
allocated, without pages of mapped files, which the system takes back when it needs them). The peak over
what was there before is set against the bytes of the loaded weights.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from engine import deliver, environment, run
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 128_001,
}
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
    d, ffn, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 512
    shapes = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ffn, d),
        "mlp.up_proj": (ffn, d),
        "mlp.down_proj": (d, ffn),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    ends = {"model.embed_tokens.weight": (CONFIG["vocab_size"], d), "model.norm.weight": (d,)}
    shards = [ends]
    for first in range(0, CONFIG["num_hidden_layers"], SHARD_LAYERS):
        layers = range(first, first + SHARD_LAYERS)
        shards.append(
            {f"model.layers.{i}.{n}.weight": s for i in layers for n, s in shapes.items()}
        )
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number}.safetensors"
        save_file(
            {n: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02) for n, s in shard.items()},
            folder / name,
        )
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))


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
