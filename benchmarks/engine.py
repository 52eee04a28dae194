"""Plain decoding of this engine against transformers' generate and against the memory ceiling.

SmolLM2-135M, batch 1, 128 tokens after a 128-token prompt, the same weights and the same process:

    python benchmarks/engine.py --output benchmarks/results/engine.json

Rounds are interleaved, so that a machine that drifts hurts all rows alike; figures are medians. The
ceiling is the bytes of weights that one step reads over the read bandwidth measured in the same run.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor

from layerskip import LayerSkipModel
from layerskip.bench import machine as machine
from layerskip.bench.machine import read_bandwidth
from layerskip.fileio import replace
from layerskip.model import Decoder, KVCache, pull

K = TypeVar("K", bound=Hashable)
ROOT = Path(__file__).parent.parent
PROMPT_TOKENS = NEW_TOKENS = 128
VERIFY_POSITIONS = (1, 2, 4, 6, 8, 12, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--no-compile", action="store_true", help="PyTorch runs the layers")
    options = parsed(parser)
    folder = pull("smollm2-135m")
    compiled = False if options.no_compile else None
    model = LayerSkipModel.from_pretrained(folder, dtype=options.dtype, compile=compiled)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file="model.gguf",
        dtype=getattr(torch, options.dtype),
        quantization_config=transformers.GgufConfig(
            dequantize=True
        ),  # 16-bit weights on both sides
    ).eval()
    prompt = model.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))[:PROMPT_TOKENS]
    speeds, bandwidth = speed_of_both(model, reference, prompt, options.rounds)
    weight_bytes = model.decoder.weight_bytes
    ceiling = bandwidth / weight_bytes
    plain, theirs = speeds["layerskip plain"], speeds["transformers generate"]
    result = {
        "environment": environment_of("benchmarks/engine.py", model),
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "tokens_per_s": speeds,
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "weight_bytes": weight_bytes,
        "ceiling_tokens_per_s": ceiling,
        "speedup_over_transformers": plain / theirs,
        "share_of_ceiling": plain / ceiling,
        "verify_ms": verify_cost(model.decoder, options.rounds),
        "step_parts_ms": step_parts(model.decoder, options.rounds),
        "identical_to_transformers": same_answer(model, reference, prompt),
    }
    verify = result["verify_ms"]
    result["verify_8_over_1"] = verify["8"] / verify["1"]
    deliver(result, options.output)


def speed_of_both(
    model: LayerSkipModel, reference: Any, prompt: list[int], rounds: int
) -> tuple[dict[str, float], float]:
    """Median decode speed (tokens/s, the prompt's pass left out) of both, and read bandwidth (bytes/s).

    All three are taken in turns, since the bandwidth of a shared machine drifts as well.
    """

    def ours() -> float:
        answer = model.generate(prompt, mode="plain", max_new_tokens=NEW_TOKENS, ignore_eos=True)
        return answer.tokens_per_s

    def theirs() -> float:
        first_ms, whole_ms = (
            ms_of(reference_answer, reference, prompt, n) for n in (1, NEW_TOKENS)
        )
        return 1e3 * (NEW_TOKENS - 1) / (whole_ms - first_ms)

    figures = {
        "layerskip plain": ours,
        "transformers generate": theirs,
        "bandwidth": lambda: read_bandwidth(model.decoder.device),
    }
    medians = interleaved(figures, rounds)
    return medians, medians.pop("bandwidth")


def reference_answer(reference: Any, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n,
            min_new_tokens=n,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def same_answer(model: LayerSkipModel, reference: Any, prompt: list[int]) -> bool:
    answer = model.generate(prompt, mode="plain", max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return answer.token_ids == reference_answer(reference, prompt, NEW_TOKENS)


@torch.inference_mode()
def verify_cost(
    decoder: Decoder, rounds: int, positions: Iterable[int] = VERIFY_POSITIONS
) -> dict[str, float]:
    """Milliseconds of all layers and the head over n positions, after 192 others, in turns."""
    cache = decoder.new_cache(256)
    passes = {str(n): partial(ms_of, verify, decoder, cache, n) for n in positions}
    return interleaved(passes, 8 * rounds)


def verify(decoder: Decoder, cache: KVCache, n: int) -> None:
    """A pass of all layers and the head over n positions, after 192 others."""
    cache.lengths.fill_(192)
    tokens = torch.zeros(1, n, dtype=torch.int64)
    decoder.logits(decoder.run(decoder.embed(tokens), 0, len(decoder.layers), cache))


@torch.inference_mode()
def step_parts(decoder: Decoder, rounds: int) -> dict[str, float]:
    """Where a single-token step spends its time, in milliseconds; parts timed alone, in turns."""
    cache = decoder.new_cache(256)
    token = torch.zeros(1, 1, dtype=torch.int64)
    hidden = decoder.embed(token)

    def layers(entering: Tensor) -> Tensor:
        cache.lengths.fill_(192)
        return decoder.run(entering, 0, len(decoder.layers), cache)

    parts: dict[str, Callable[[], Any]] = {
        "whole step": lambda: decoder.logits(layers(decoder.embed(token))).argmax(),
        "layers": lambda: layers(hidden),
        "norm and head": lambda: decoder.logits(hidden),
    }
    if decoder.kernels == "pytorch":
        parts["products in the layers"] = lambda: layer_products(decoder)
    times = interleaved({name: partial(ms_of, part) for name, part in parts.items()}, 8 * rounds)
    times["all else"] = times["whole step"] - times["layers"] - times["norm and head"]
    return times


def layer_products(decoder: Decoder) -> None:
    """The matrix products of all layers for one row, and nothing between them."""
    a = decoder.architecture
    narrow, wide = (torch.ones(1, n, dtype=decoder.dtype) for n in (a.hidden_size, a.ffn_size))
    for w in decoder.layers:
        for product in (w.qkv, w.attention_out, w.mlp.gate_up):
            product(narrow)
        w.mlp.down(wide)


def interleaved(
    figures: Mapping[K, Callable[[], float]], rounds: int, *, warm_ups: int = 1
) -> dict[K, float]:
    """Median of each figure; one of each, then the next round. Those of the warm-up do not count."""
    for figure in [*figures.values()] * warm_ups:
        figure()
    runs = [{name: figure() for name, figure in figures.items()} for _ in range(rounds)]
    return {name: statistics.median(r[name] for r in runs) for name in figures}


def ms_of(work: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return 1e3 * (time.perf_counter() - start)


def parsed(parser: argparse.ArgumentParser, *, writes_always: bool = False) -> argparse.Namespace:
    """The command line of a script, --threads and --output included; the threads are set.

    `writes_always`: a file has to be named.
    """
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, required=writes_always)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def deliver(result: dict[str, Any], output: Path | None) -> None:
    """Print a result, and write it to a file where one is named."""
    print(json.dumps(result, indent=2))
    if output:
        write(result, output)


def write(result: dict[str, Any], output: Path) -> None:
    """Write a result so that its file appears whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    replace(output, f"{json.dumps(result, indent=2)}\n".encode())


def environment(
    script: str,
    dtype: str,
    kernels: str | None = None,
    device: str = "cpu",
    weights: str = "16bit",
) -> dict[str, Any]:
    """What the figures depend on, the commit and the command included.

    `kernels` and `weights` are those of the decoder; without kernels there are several, or none.
    """
    here = machine.environment(
        dtype=getattr(torch, dtype), weights=weights, device=device, kernels=kernels or "pytorch"
    )
    command = shlex.join(["python", *script.split(), *sys.argv[1:]])
    return {"command": command, "commit": machine.commit(), **here, "kernels": kernels}


def environment_of(
    script: str, model: LayerSkipModel, weights: str | None = None
) -> dict[str, Any]:
    """`environment` of a model; `weights` are named where it was measured in several."""
    decoder = model.decoder
    dtype = decoder.dtype_name  # the default depends on the machine
    return environment(script, dtype, decoder.kernels, weights=weights or decoder.weights)


def run(main: Callable[[], None]) -> None:
    """A script: what cannot be measured is one line, as in the commands."""
    try:
        main()
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    run(main)
