"""Measure what an exit adapter adds to a model: memory, and time of the prompt.

    python benchmarks/adapter_cost.py --output benchmarks/results/adapter-cost.json

Memory is that of adapter and draft head over that of the base's weights. Time is that of filling the
adapter's KV cache and making its head for a prompt, over the base's pass over the prompt; both are
medians of interleaved rounds.
"""

import argparse
from functools import partial
from typing import Any

import torch
from common import comma_separated, deliver, environment, interleaved, ms_of, parse, run
from torch import Tensor

from layerskip import LayerSkipModel
from layerskip.decoding.exit_adapter import ExitAdapter, draft_head
from layerskip.decoding.sampling import Sampler, Sampling
from layerskip.model import Decoder
from layerskip.model.exit_adapter import ExitAdapterWeights

PROMPT_TOKENS = (512, 1024)  # states of shorter prompts are read with the first draft


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a model with an exit adapter")
    parser.add_argument("--weights", type=comma_separated, default=["16bit", "int8", "stored"])
    parser.add_argument("--rounds", type=int, default=15)
    options = parse(parser)
    weights = ",".join(options.weights)
    result = {
        "environment": environment("benchmarks/adapter_cost.py", "bfloat16", weights=weights),
        "model": options.model,
        "rows": [measure(options.model, kind, options.rounds) for kind in options.weights],
    }
    deliver(result, options.output)


def measure(name: str, weights: str, rounds: int) -> dict[str, Any]:
    """Return the added shares of memory, and of the time of prompts by their tokens."""
    model = LayerSkipModel.from_pretrained(name, weights=weights)
    decoder, adapter = model.decoder, model.adapter
    if adapter is None:
        raise ValueError(f"{name} has no exit adapter: train one with layerskip adapt")
    added_bytes = adapter.weight_bytes + draft_head(adapter).decoder.head_bytes
    share_of_time = {}
    for n in PROMPT_TOKENS:
        prompt = torch.randint(1000, (1, n), generator=torch.manual_seed(0))
        states = base_pass(decoder, prompt, adapter.settings.exit_layer)
        passes = {
            "base": partial(ms_of, base_pass, decoder, prompt, adapter.settings.exit_layer),
            "adapter": partial(ms_of, adapter_pass, decoder, adapter, prompt, states),
        }
        medians = interleaved(passes, rounds)
        share_of_time[n] = medians["adapter"] / medians["base"]
    return {
        "weights": weights,
        "memory": added_bytes / decoder.weight_bytes,
        "prompt_time": share_of_time,
    }


@torch.inference_mode()
def base_pass(decoder: Decoder, prompt: Tensor, exit_layer: int) -> tuple[Tensor, Tensor]:
    """Run the model over a prompt [1, n]; return the states leaving layers E and L, [1, n, D]."""
    cache, layers = decoder.new_cache(prompt.shape[1]), len(decoder.layers)
    exit_states = decoder.run(decoder.embed(prompt), 0, exit_layer, cache)
    last_states = decoder.run(exit_states, exit_layer, layers, cache)
    decoder.greedy_tokens(last_states[:, -1:])
    return exit_states, last_states


@torch.inference_mode()
def adapter_pass(
    decoder: Decoder, adapter: ExitAdapterWeights, prompt: Tensor, states: tuple[Tensor, Tensor]
) -> None:
    """Make the adapter's head for a prompt, and give it the states of the prompt's pass."""
    head, sampler = draft_head(adapter, prompt[0].tolist()), Sampler(Sampling(), decoder.device)
    drafter = ExitAdapter(decoder, adapter, sampler, head, prompt.shape[1] + 1, head_share=1.0)
    drafter.read_states(*states)


if __name__ == "__main__":
    run(main)
