"""The compiled kernels against PyTorch's own, on the same weights: ms of a pass over n positions.

    python benchmarks/compiled_kernels.py --output benchmarks/results/kernels.json

SmolLM2-135M after 192 positions, both decoders in turns in one process, medians. The products of 8- and
4-bit weights in PyTorch are its product with 4-bit weights (bfloat16 alone); see docs/weights.md.
"""

import argparse
from functools import partial

import torch
from engine import deliver, environment, interleaved, ms_of, parsed, run, verify

from layerskip import LayerSkipModel

POSITIONS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
KINDS = ("float32", "bfloat16", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=30)
    options = parsed(parser)
    found = {kind: compare(options.model, kind, options.rounds) for kind in KINDS}
    here = environment("benchmarks/compiled_kernels.py", "bfloat16")
    deliver({"environment": here, "model": options.model, "ms": found}, options.output)


@torch.inference_mode()
def compare(name: str, kind: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds, by what runs the layers and by the number of positions."""
    how = {"dtype": kind} if "float" in kind else {"dtype": "bfloat16", "weights": kind}
    passes = {}
    for compiled in (True, False):
        decoder = LayerSkipModel.from_pretrained(name, compile=compiled, **how).decoder
        cache = decoder.new_cache(256)
        for n in POSITIONS:
            passes[decoder.kernels, n] = partial(ms_of, verify, decoder, cache, n)
    times = interleaved(passes, rounds)
    return {
        kernels: {str(n): ms for (by, n), ms in times.items() if by == kernels}
        for kernels in ("compiled", "pytorch")
    }


if __name__ == "__main__":
    run(main)
