"""What choosing the exit anew in every round could gain, on recorded agreement.

    LAYERSKIP_DATA=data python benchmarks/exit_choice.py runs/topv2 --task topv2 \\
        --output benchmarks/results/exit-choice.json

Greedy answers of a checkpoint are recorded once, with what every exit would have said along them, and
rounds are replayed over them; a round costs what `DraftCosts` says. Compared, in tokens for the time of
a plain step: the best pair (E, d) for all prompts; exits and lengths chosen in every round by the
acceptance that the answer has shown so far, which begins at the exits' averages; the best pair of each
prompt, chosen with hindsight, which no choice inside the answer is likely to beat.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from engine import deliver, environment_of, parsed, run
from paper.measures import answers

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.decoding.draft_costs import DraftCosts
from layerskip.tune.predict import Continuation, agreement_rate

LENGTHS = range(1, 9)
PRIORS = (5, 20, 80)  # tokens that an exit's average weighs as much as
HEAD_SHARE = 0.1  # a short head of about 5,000 tokens

Pair = tuple[int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--task", default="topv2")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--exits", default="4,5,6,7,8,9,10,12,15")
    options = parsed(parser)
    exits = [int(text) for text in options.exits.split(",")]
    model = LayerSkipModel.from_pretrained(options.model)
    task = load_task(options.task, samples=options.rows, seed=0, judged=False)
    recorded = answers(model, task, exits, task.max_new_tokens)
    costs = {e: DraftCosts.of(model.decoder, e, HEAD_SHARE) for e in exits}
    result = {
        "environment": environment_of("benchmarks/exit_choice.py", model),
        "model": options.model,
        "task": options.task,
        "answers": len(recorded),
        "agreement": {e: agreement_rate(recorded, e) for e in exits},
        "tokens_a_plain_step": compare(recorded, costs),
    }
    deliver(result, options.output)


def compare(recorded: Sequence[Continuation], costs: dict[int, DraftCosts]) -> dict[str, Any]:
    pairs = [(e, d) for e in costs for d in LENGTHS]
    times = {
        pair: [replay_time(c, costs, lambda pair=pair: pair) for c in recorded] for pair in pairs
    }
    tokens = sum(len(c.token_ids) - 1 for c in recorded)
    best = min(pairs, key=lambda pair: sum(times[pair]))
    hindsight = sum(min(times[pair][i] for pair in pairs) for i in range(len(recorded)))
    averages = {e: agreement_rate(recorded, e) for e in costs}
    found: dict[str, Any] = {
        "best pair": {"exit_layer": best[0], "draft_tokens": best[1]},
        "best pair for all": tokens / sum(times[best]),
        "best pair of each prompt, with hindsight": tokens / hindsight,
    }
    for prior in PRIORS:
        for label, chosen_from in (
            ("length", {best[0]: averages[best[0]]}),
            ("exit and length", averages),
        ):
            spent = 0.0
            for c in recorded:
                choice = RunningChoice(chosen_from, prior, costs)
                spent += replay_time(c, costs, choice.choose, choice.learn)
            found[f"{label} in every round, prior of {prior} tokens"] = tokens / spent
    return found


class RunningChoice:
    """The pair that promises most by the acceptance shown so far in one answer."""

    def __init__(
        self, averages: dict[int, float], prior: float, costs: dict[int, DraftCosts]
    ) -> None:
        self._right = {e: prior * average for e, average in averages.items()}
        self._judged = dict.fromkeys(averages, prior)
        self._costs = costs

    def choose(self) -> Pair:
        """E and d of the next round."""
        pairs = [(e, d) for e in self._right for d in LENGTHS]
        return max(pairs, key=self._promise)

    def _promise(self, pair: Pair) -> float:
        exit_layer, d = pair
        chance = self._right[exit_layer] / self._judged[exit_layer]
        tokens = sum(chance**i for i in range(d + 1))
        return tokens / self._costs[exit_layer].round(d, d)

    def learn(self, exit_layer: int, drafted: int, accepted: int) -> None:
        """Take note of a round."""
        self._right[exit_layer] += accepted
        self._judged[exit_layer] += min(drafted, accepted + 1)


def replay_time(
    answer: Continuation,
    costs: dict[int, DraftCosts],
    choose: Callable[[], Pair],
    learn: Callable[[int, int, int], None] = lambda *_: None,
) -> float:
    """What the rounds of an answer cost, in plain steps."""
    produced, time = 1, 0.0
    while produced < len(answer.token_ids):
        exit_layer, d = choose()
        drafted = answer.draft_length(produced, d)
        marks = answer.agreement[exit_layer][produced - 1 : produced - 1 + drafted]
        accepted = next((i for i, mark in enumerate(marks) if not mark), len(marks))
        time += costs[exit_layer].round(drafted, drafted) if drafted else 1.0
        learn(exit_layer, drafted, accepted)
        produced += accepted + 1
    return time


if __name__ == "__main__":
    run(main)
