"""Compare the compiled CPU kernels with eager PyTorch and torch.compile on the same weights.

    python benchmarks/compiled_kernels.py --output kernels.json
    python benchmarks/compiled_kernels.py --torch-compile --output benchmarks/results/torch-compile.json

Reports the milliseconds of one pass of all layers and the head over n positions after 192 others;
the decoders are interleaved in one process. int8 and int4 are quantized weights with bfloat16
activations. With --torch-compile the baseline is the forward pass of transformers over
a static cache in bfloat16, one graph for each n, with frozen weights and C++ GEMM templates.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch._inductor.config as inductor
from common import VERIFY_CONTEXT, deliver, environment, interleaved, ms_of, parse, run, verify
from transformers import PreTrainedModel, StaticCache

from layerskip import LayerSkipModel
from layerskip.training.loading import pretrained_model

POSITIONS = (1, 2, 3, 4, 5, 6, 8, 12, 16)
GRAPH_POSITIONS = (1, 4)  # one compilation of minutes each
KINDS = ("float32", "bfloat16", "int8", "int4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--torch-compile", action="store_true", help="compare with torch.compile")
    options = parse(parser)
    result = {
        "environment": environment("benchmarks/compiled_kernels.py", "bfloat16"),
        "model": options.model,
    }
    if options.torch_compile:
        result |= compare_with_torch_compile(options.model, options.rounds)
    else:
        result["ms"] = {
            kind: compare_with_eager(options.model, kind, options.rounds) for kind in KINDS
        }
    deliver(result, options.output)


def compare_with_eager(name: str, kind: str, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds by implementation ("compiled", "pytorch") and number of positions."""
    options = {"dtype": kind} if "float" in kind else {"dtype": "bfloat16", "weights": kind}
    passes = {}
    for compiled in (True, False):
        decoder = LayerSkipModel.from_pretrained(name, compile=compiled, **options).decoder
        cache = decoder.new_cache(256)
        for n in POSITIONS:
            passes[decoder.kernels, n] = partial(ms_of, verify, decoder, cache, n)
    return _by_system(interleaved(passes, rounds))


@torch.no_grad()  # weights are not frozen under inference mode
def compare_with_torch_compile(name: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by system and number of positions, and seconds to compile each graph."""
    inductor.freezing = inductor.max_autotune = True
    inductor.max_autotune_gemm_backends = "CPP,ATEN"
    baseline = pretrained_model(name).to(torch.bfloat16).eval()
    decoder = LayerSkipModel.from_pretrained(name, dtype="bfloat16").decoder
    passes, seconds = {}, {}
    for n in GRAPH_POSITIONS:
        graph = _compiled_forward(baseline, n, calls=rounds + 8)
        seconds[str(n)] = 1e-3 * ms_of(graph)
        passes["torch.compile", n] = partial(ms_of, graph)
        cache = decoder.new_cache(VERIFY_CONTEXT + n)
        passes["layerskip", n] = partial(ms_of, verify, decoder, cache, n)
    times = interleaved(passes, rounds, warm_ups=3)
    return {"ms": _by_system(times), "seconds_to_compile": {"torch.compile": seconds}}


def _compiled_forward(model: PreTrainedModel, n: int, calls: int) -> Callable[[], object]:
    """Return a compiled pass over n positions; each call advances the cache by n."""
    cache = StaticCache(config=model.config, max_cache_len=VERIFY_CONTEXT + n * calls)
    model(torch.zeros(1, VERIFY_CONTEXT, dtype=torch.int64), past_key_values=cache)
    tokens = torch.zeros(1, n, dtype=torch.int64)
    positions = torch.arange(VERIFY_CONTEXT, VERIFY_CONTEXT + n)[None]

    def forward(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(tokens, position_ids=positions, past_key_values=cache).logits

    return partial(torch.compile(forward, dynamic=False), tokens, positions)


def _by_system(times: dict[tuple[str, int], float]) -> dict[str, dict[str, float]]:
    systems = dict.fromkeys(system for system, _ in times)
    return {s: {str(n): ms for (system, n), ms in times.items() if system == s} for s in systems}


if __name__ == "__main__":
    run(main)
