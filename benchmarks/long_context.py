"""Measure plain decoding behind contexts of 128 to 8,192 tokens, with a 16-bit and an int8 KV cache.

    python benchmarks/long_context.py --output benchmarks/results/long-context.json

Reports tokens/s, and the bytes of weights, keys and values that a step reads, over the machine's read
bandwidth. All contexts and caches are interleaved.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import deliver, environment, interleaved, llama_bench, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.machine import read_bandwidth
from layerskip.model import Decoder, KVCache
from layerskip.model.kv_cache import KV_CACHES

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--weights", default="16bit")
    parser.add_argument("--gguf", type=Path, help="file of the same weights, for llama.cpp")
    parser.add_argument("--llama-bench", metavar="PROGRAM", help="of a build of llama.cpp")
    options = parse(parser)
    bandwidth = read_bandwidth(torch.device("cpu"))
    caches, steps = {}, {}
    for kv_cache in KV_CACHES:
        model = LayerSkipModel.from_pretrained(
            options.model, dtype=options.dtype, weights=options.weights, kv_cache=kv_cache
        )
        caches[kv_cache] = model.decoder, filled_cache(model.decoder, max(CONTEXTS) + 1)
        for context in CONTEXTS:
            steps[kv_cache, context] = partial(seconds, *caches[kv_cache], context)
    rows = []
    for (kv_cache, context), s in interleaved(steps, options.rounds).items():
        decoder, cache = caches[kv_cache]
        cache_bytes = cache.slots.nbytes // cache.slots.shape[-2] * context
        rows.append(
            {
                "system": "layerskip",
                "kv_cache": kv_cache,
                "context": context,
                "tokens_per_s": 1 / s,
                "weight_bytes": decoder.weight_bytes,
                "cache_bytes": cache_bytes,
                "bandwidth_share": (decoder.weight_bytes + cache_bytes) / s / bandwidth,
            }
        )
    if options.llama_bench:
        rows += llama_cpp_rows(options.llama_bench, options.gguf, options.threads)
    result: dict[str, Any] = {
        "environment": environment("benchmarks/long_context.py", options.dtype, decoder.kernels),
        "model": options.model,
        "read_bandwidth_bytes_per_s": bandwidth,
        "rows": rows,
    }
    deliver(result, options.output)


def llama_cpp_rows(program: str, file: Path, threads: int) -> list[dict[str, Any]]:
    """Return rows of llama.cpp, with keys and values in 16 bits and in q8_0."""
    contexts = ",".join(map(str, CONTEXTS))
    rows = []
    # On a CPU, flash attention may cost time; a quantized cache needs it.
    for kv_cache, flash_attention in (("f16", False), ("f16", True), ("q8_0", True)):
        options = ["-p", "0", "-n", "32", "-r", "1", "--no-warmup", "-d", contexts]
        options += ["-ctk", kv_cache, "-ctv", kv_cache]
        results = llama_bench(program, file, threads, *options, flash_attention=flash_attention)
        for one in results:
            rows.append(
                {
                    "system": "llama.cpp",
                    "kv_cache": kv_cache + ", no flash attention" * (not flash_attention),
                    "context": one["n_depth"],
                    "tokens_per_s": one["avg_ts"],
                }
            )
    return rows


@torch.inference_mode()
def filled_cache(decoder: Decoder, capacity: int) -> KVCache:
    """Return a cache whose every position holds a key and value: pages of zeros would not be read."""
    cache, tokens = decoder.new_cache(capacity), torch.arange(1, CONTEXTS[0] + 1)[None]
    decoder.run(decoder.embed(tokens), 0, len(decoder.layers), cache)
    for begin in range(CONTEXTS[0], cache.slots.shape[-2], CONTEXTS[0]):
        part = cache.slots[..., begin : begin + CONTEXTS[0], :]
        part.copy_(cache.slots[..., : part.shape[-2], :])
    return cache


@torch.inference_mode()
def seconds(decoder: Decoder, cache: KVCache, context: int) -> float:
    """Return the time of one greedy step behind a context."""
    cache.lengths.fill_(context)
    start = time.perf_counter()
    decoder.greedy_step(torch.ones(1, 1, dtype=torch.int64), len(decoder.layers), cache)
    return time.perf_counter() - start


if __name__ == "__main__":
    run(main)
