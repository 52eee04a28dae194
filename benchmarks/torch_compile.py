"""The compiled kernels against torch.compile, on the same weights: ms of a pass over n positions.

    python benchmarks/torch_compile.py --output benchmarks/results/torch-compile.json

transformers' own forward pass of SmolLM2-135M over a static cache, after 192 positions, with all that
PyTorch offers on a CPU: static shapes, weights frozen into the graph, C++ products chosen by trial.
One graph for each number of positions; both systems in turns in one process, medians.
"""

import argparse
from collections.abc import Callable

import torch
import torch._inductor.config as inductor
from engine import deliver, environment, interleaved, ms_of, parsed, run, verify
from transformers import PreTrainedModel, StaticCache

from layerskip import LayerSkipModel
from layerskip.training.loading import pretrained_model

POSITIONS = (1, 4)
BEFORE = 192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=20)
    options = parsed(parser, writes_always=True)
    inductor.freezing = inductor.max_autotune = True
    inductor.max_autotune_gemm_backends = "CPP,ATEN"
    found = compare(options.model, options.rounds)
    here = environment("benchmarks/torch_compile.py", "bfloat16")
    deliver({"environment": here, "model": options.model, **found}, options.output)


@torch.no_grad()  # under inference mode nothing is frozen
def compare(name: str, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds by system and number of positions, and seconds to compile each graph."""
    theirs = pretrained_model(name).to(torch.bfloat16).eval()
    ours = LayerSkipModel.from_pretrained(name, dtype="bfloat16").decoder
    passes, seconds = {}, {}
    for n in POSITIONS:
        passes["torch.compile", n] = one_graph(theirs, n, calls=rounds + 8)
        seconds[str(n)] = 1e-3 * ms_of(passes["torch.compile", n])
        cache = ours.new_cache(BEFORE + n)
        passes["layerskip", n] = lambda cache=cache, n=n: verify(ours, cache, n)
    times = interleaved(
        {key: lambda p=p: ms_of(p) for key, p in passes.items()}, rounds, warm_ups=3
    )
    systems = {system for system, _ in passes}
    ms = {s: {str(n): found for (by, n), found in times.items() if by == s} for s in systems}
    return {"ms": ms, "seconds_to_compile": {"torch.compile": seconds}}


def one_graph(model: PreTrainedModel, n: int, calls: int) -> Callable[[], object]:
    """A pass of all layers and the head over n positions; the cache moves on by n a call."""
    cache = StaticCache(config=model.config, max_cache_len=BEFORE + n * calls)
    model(torch.zeros(1, BEFORE, dtype=torch.int64), past_key_values=cache)
    tokens, positions = torch.zeros(1, n, dtype=torch.int64), torch.arange(BEFORE, BEFORE + n)[None]

    def forward(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(tokens, position_ids=positions, past_key_values=cache).logits

    compiled = torch.compile(forward, dynamic=False)
    return lambda: compiled(tokens, positions)


if __name__ == "__main__":
    run(main)
