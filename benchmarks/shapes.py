"""What self-speculation comes to in larger models: random weights in their shapes, scripted acceptance.

    python benchmarks/shapes.py --shapes llama-3.2-1b --output benchmarks/results/shapes.json
    python benchmarks/shapes.py --shapes llama-3.2-1b,llama-3-8b --device cuda --weights 16bit,int4

Random weights take as long as trained ones, but no exit of theirs agrees with the last layer. So whole
rounds are timed as they are, drafting, verifying and accepting, and then a coin says how many tokens of
the draft stand, each with a probability that is given. Plain answers and those rounds are timed in
turns; the ceiling is the read bandwidth of the same run over the bytes of a plain step's weights.
"""

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engine import deliver, environment, interleaved, parsed, run
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from layerskip.bench.machine import read_bandwidth
from layerskip.decoding import Plan, Sampling, generate
from layerskip.decoding.accept import accept_greedy
from layerskip.model import Decoder, native
from layerskip.model.families import from_config
from layerskip.model.loader import build
from layerskip.model.quantize import Quantized
from layerskip.model.step_timing import device_clock

# Vocabulary, hidden size, width of the MLP, layers, heads, heads of keys and values, tied head.
SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3, True),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, True),
    "llama-3-8b": (128256, 4096, 14336, 32, 32, 8, False),
}
PROMPT_TOKENS = 128
POSITIONS = (1, 2, 4, 5, 8, 16)
ACCEPTANCE = (0.6, 0.75, 0.9)
_COIN = torch.Generator().manual_seed(0)  # of the whole run: each repetition tosses anew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="smollm2-135m,llama-3.2-1b", help=", ".join(SHAPES))
    parser.add_argument("--weights", default="16bit,int8,int4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--exit-share", type=float, default=1 / 8, help="E as a share of the layers"
    )
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parsed(parser)
    shapes = options.shapes.split(",")
    if unknown := sorted(set(shapes) - set(SHAPES)):
        parser.error(f"no shape is called {', '.join(unknown)}; there are: {', '.join(SHAPES)}")
    if options.device == "cpu":
        native.prepare()
    rows = []
    for shape in shapes:
        for weights in options.weights.split(","):
            decoder = random_decoder(config_of(shape), weights, torch.device(options.device))
            exit_layer = max(1, round(options.exit_share * len(decoder.layers)))
            figures = measure(
                decoder, exit_layer, options.draft_tokens, options.new_tokens, options.rounds
            )
            rows.append({"shape": shape, "weights": weights, **figures})
            del decoder
    here = environment(
        "benchmarks/shapes.py",
        "bfloat16",
        rows[-1]["kernels"],
        options.device,
        weights=options.weights,
    )
    deliver({"environment": here, "prompt_tokens": PROMPT_TOKENS, "rows": rows}, options.output)


def config_of(shape: str) -> LlamaConfig:
    """A Llama of a shape."""
    vocabulary, hidden, ffn, layers, heads, kv_heads, tied = SHAPES[shape]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )


class RandomTensors:
    """A checkpoint of random weights that are made when they are read: `model.files.weights.Tensors`."""

    rotary_layout = "halves"

    def __init__(self, config: LlamaConfig, device: torch.device) -> None:
        self.paths: list[Path] = []
        with torch.device("meta"):
            named = LlamaForCausalLM(config).state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
        self._device = device
        self._chance = torch.Generator(device).manual_seed(0)

    def names(self) -> set[str]:
        """See `Tensors`."""
        return set(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        return self._shapes[name]

    def stored_as(self, name: str) -> str:
        """See `Tensors`."""
        return "BF16"

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See `Tensors`."""
        size = torch.empty(self._shapes[name], dtype=torch.bfloat16, device=self._device)
        return size.normal_(0.0, 0.02, generator=self._chance).to(dtype or size.dtype)

    def quantized(self, name: str) -> Quantized | None:
        """See `Tensors`."""
        return None


def random_decoder(config: LlamaConfig, weights: str, device: torch.device) -> Decoder:
    """A decoder of a shape, in bfloat16, with the fastest kernels that there are."""
    return build(
        from_config(config.to_dict()),
        RandomTensors(config, device),
        tied=config.tie_word_embeddings,
        dtype=torch.bfloat16,
        device=device,
        weights=weights,
        compiled=True,
    )


@torch.inference_mode()
def measure(
    decoder: Decoder, exit_layer: int, draft_tokens: int, new_tokens: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second plain and self-speculative, the cost of verifying, and the ceiling."""
    plain = Plan(mode="plain")
    drafting = Plan(mode="self-speculative", exit_layer=exit_layer, draft_tokens=draft_tokens)
    works = {
        "plain": partial(tokens_per_s, decoder, plain, new_tokens, 0.0),
        "bandwidth": partial(read_bandwidth, decoder.device),
        **{
            f"accepted {chance}": partial(tokens_per_s, decoder, drafting, new_tokens, chance)
            for chance in ACCEPTANCE
        },
        **{f"pass {n}": partial(pass_ms, decoder, n) for n in POSITIONS},
    }
    found = interleaved(works, rounds, warm_ups=2)
    ceiling = found["bandwidth"] / decoder.weight_bytes
    return {
        "layers": len(decoder.layers),
        "kernels": decoder.kernels,
        "weight_bytes": decoder.weight_bytes,
        "read_bandwidth_gb_per_s": found["bandwidth"] / 1e9,
        "ceiling_tokens_per_s": ceiling,
        "plain_tokens_per_s": found["plain"],
        "share_of_ceiling": found["plain"] / ceiling,
        "pass_ms": {str(n): found[f"pass {n}"] for n in POSITIONS},
        "exit_layer": exit_layer,
        "draft_tokens": draft_tokens,
        "self_speculative": [
            {
                "chance_of_a_token": chance,
                "tokens_per_s": found[f"accepted {chance}"],
                "speedup": found[f"accepted {chance}"] / found["plain"],
            }
            for chance in ACCEPTANCE
        ],
    }


def tokens_per_s(decoder: Decoder, plan: Plan, new_tokens: int, chance: float) -> float:
    """Of one answer, the prompt's pass left out; each drafted token stands with a probability."""
    prompt = [(7 * i) % decoder.architecture.vocab_size for i in range(PROMPT_TOKENS)]
    now = device_clock(decoder.device)
    with scripted(chance):
        steps = generate(decoder, prompt, plan=plan, sampling=Sampling(), max_new_tokens=new_tokens)
        next(steps)
        start = now()
        made = sum(len(step.tokens) for step in steps)
        return made / (now() - start)


@contextlib.contextmanager
def scripted(chance: float) -> Iterator[None]:
    """Rounds accept what a coin says, after all the work of finding out what they should."""

    def tossed(drafted: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        _, following = accept_greedy(drafted, best)
        stands = torch.rand(drafted.shape, generator=_COIN) < chance
        return stands.cumprod(dim=1).sum(dim=1).to(drafted.device), following

    with mock.patch("layerskip.decoding.generate.accept_greedy", tossed):
        yield


def pass_ms(decoder: Decoder, n: int) -> float:
    """All layers and the choice of a token over n positions, after the prompt's, in milliseconds."""
    cache, now = decoder.new_cache(PROMPT_TOKENS + n), device_clock(decoder.device)
    tokens = torch.zeros(1, n, dtype=torch.int64, device=decoder.device)
    times = []
    for _ in range(5):
        cache.lengths.fill_(PROMPT_TOKENS)
        start = now()
        decoder.choose(decoder.run(decoder.embed(tokens), 0, len(decoder.layers), cache)).tolist()
        times.append(1e3 * (now() - start))
    return statistics.median(times)


if __name__ == "__main__":
    run(main)
