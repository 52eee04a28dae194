"""Ablation of the constants of `decoding/controller.py`: tokens per unit of cost in mode auto.

Each constant is changed to a smaller and a larger value, one at a time. The cost of a round is that of
the controller's own cost table, so the figures depend on the answers alone and not on the machine's
load: they are predicted speedups over plain decoding.
"""

import argparse
from typing import Any
from unittest import mock

from common import deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.decoding import controller
from layerskip.decoding.controller import DraftController

VALUES: dict[str, tuple[float, float]] = {
    "PRIOR_WEIGHT": (1.0, 10.0),
    "EXIT_ACCEPTANCE": (0.5, 0.9),
    "EXIT_ACCEPTANCE_WEIGHT": (0.5, 8.0),
    "MEMORY": (0.8, 0.99),
    "PLAIN_ROUNDS": (1.0, 16.0),
    "BACKOFF_ROUNDS": (1, 16),
    "MAX_BACKOFF_ROUNDS": (4, 128),
    "LOOKAHEAD": (0, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-layerskip")
    parser.add_argument("--tasks", default="topv2,spec_bench")
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, dtype="bfloat16")
    tasks = options.tasks.split(",")
    prompts = {
        name: [
            model.tokenize(sample.prompt)
            for sample in load_task(name, samples=options.samples, judged=False).samples
        ]
        for name in tasks
    }

    def speedups() -> dict[str, float]:
        return {name: predicted_speedup(model, prompts[name], options) for name in tasks}

    rows: list[dict[str, Any]] = [{"constant": None, "value": None, "speedup": speedups()}]
    for name, values in VALUES.items():
        for value in values:
            with mock.patch.object(controller, name, value):
                rows.append({"constant": name, "value": value, "speedup": speedups()})
            print(rows[-1], flush=True)
    defaults = {name: getattr(controller, name) for name in VALUES}
    here = environment_of("benchmarks/draft_constants.py", model)
    deliver({"environment": here, "defaults": defaults, "rows": rows}, options.output)


def predicted_speedup(
    model: LayerSkipModel, prompts: list[list[int]], options: argparse.Namespace
) -> float:
    """Return the tokens over the cost of all rounds after the first step, in plain steps."""
    cost, update = 0.0, DraftController.update

    def counting(self: DraftController, *arguments: Any) -> None:
        nonlocal cost
        cost += self.round_cost(arguments[0])
        update(self, *arguments)

    with mock.patch.object(DraftController, "update", counting):
        answers = [
            model.generate(prompt, max_new_tokens=options.max_new_tokens) for prompt in prompts
        ]
    return round(sum(answer.new_tokens - 1 for answer in answers) / cost, 3)


if __name__ == "__main__":
    run(main)
