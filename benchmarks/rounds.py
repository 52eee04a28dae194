"""Rounds of mode auto against plain steps made beside them: what each kind costs, and was thought to.

    LAYERSKIP_DATA=data python benchmarks/rounds.py --model smollm2-135m-layerskip \\
        --task spec_bench --weights int8 --temperature 0,1 --output benchmarks/results/rounds.json

Both answers to a prompt are computed step by step in turns, so that a machine whose speed goes up and
down does so to both. Text is not made. A round's measured cost is its time over the mean of the plain
steps around it, the other cost is what `auto` chose by; rounds are grouped by what was drafted.
"""

import argparse
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from engine import deliver, environment_of, parsed, run

from layerskip import LayerSkipModel
from layerskip.bench.tasks import load_task
from layerskip.decoding import Plan, Step
from layerskip.decoding.draft_costs import DraftCosts
from layerskip.decoding.generate import generate
from layerskip.decoding.short_head import ReducedHead
from layerskip.model.quantize import WEIGHTS

AROUND = 8  # plain steps to each side
Kind = tuple[str, int, int]  # source, drafted, refused
Timed = list[tuple[Step, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="several with commas")
    parser.add_argument("--temperature", default="0", help="several with commas")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parsed(parser)
    lines = []
    for weights in options.weights.split(","):
        model = LayerSkipModel.from_pretrained(options.model, weights=weights)
        chat = model.has_chat_template
        task = load_task(options.task, samples=options.samples, seed=0, chat=chat, judged=False)
        for temperature in map(float, options.temperature.split(",")):
            how = {"max_new_tokens": options.max_new_tokens, "temperature": temperature}
            prompts = [(sample.category or task.name, sample.prompt) for sample in task.samples]
            found = compared(model, prompts, how)
            lines.append({"weights": weights, "temperature": temperature, **found})
            print(weights, temperature, found["all"], file=sys.stderr, flush=True)
    here = environment_of("benchmarks/rounds.py", model, options.weights)
    deliver({"environment": here, "model": options.model, "lines": lines}, options.output)


def compared(
    model: LayerSkipModel, prompts: Sequence[tuple[str, Any]], how: dict[str, Any]
) -> dict[str, Any]:
    """Both modes on prompts, each with its category; the first prompt is answered once to warm up."""
    tokens: dict[str, Counter[str]] = defaultdict(Counter)
    seconds: dict[str, Counter[str]] = defaultdict(Counter)
    rounds: dict[Kind, list[tuple[float, float]]] = defaultdict(list)
    for number, (category, prompt) in enumerate([prompts[0], *prompts]):
        made, plan, context = interleaved(model, prompt, how | {"seed": number})
        if not number:
            continue
        for mode, steps in made.items():
            tokens[category][mode] += sum(len(step.tokens) for step, _ in steps)
            seconds[category][mode] += sum(took for _, took in steps)
        thought = Thought(model, plan, context)
        plain = [took for _, took in made["plain"]]
        for at, (step, took) in enumerate(made["auto"]):
            beside = plain[max(0, at - AROUND) : at + AROUND + 1]
            if beside:
                kind = (step.source, step.drafted, step.refused)
                rounds[kind].append((took / statistics.mean(beside), thought(step)))
            context += len(step.tokens)
    each = {
        category: ratio(tokens[category], seconds[category])
        for category in tokens
        if all(tokens[category][mode] for mode in ("plain", "auto"))
    }
    groups = sorted(rounds.items(), key=lambda group: -len(group[1]))
    return {
        "by_category": each,
        "all": ratio(sum(tokens.values(), Counter()), sum(seconds.values(), Counter())),
        "rounds": [
            {
                "source": source,
                "drafted": drafted,
                "refused": refused,
                "rounds": len(costs),
                "measured": statistics.mean(measured for measured, _ in costs),
                "thought": statistics.mean(cost for _, cost in costs),
            }
            for (source, drafted, refused), costs in groups
        ],
    }


def interleaved(
    model: LayerSkipModel, prompt: Any, how: dict[str, Any]
) -> tuple[dict[str, Timed], Plan, int]:
    """The steps of both answers after the prompt's own pass, and seconds; auto's plan; the prompt."""
    loops: dict[str, Iterator[Step]] = {}
    for mode in ("plain", "auto"):
        answer = model.answer(prompt, mode=mode, ignore_eos=True, **how)
        loops[mode] = generate(model.decoder, answer.prompt, **answer.loop_options)
        next(loops[mode])
    made: dict[str, Timed] = {mode: [] for mode in loops}
    while loops:
        for mode in list(loops):
            began = time.perf_counter()
            step = next(loops[mode], None)
            took = time.perf_counter() - began
            if step is None:
                del loops[mode]
            else:
                made[mode].append((step, took))
    return made, answer.plan, len(answer.prompt)


class Thought:
    """What rounds behind a prompt are thought to cost, in plain steps."""

    def __init__(self, model: LayerSkipModel, plan: Plan, context: int) -> None:
        decoder = model.decoder
        head = ReducedHead.of(decoder, plan.draft_vocabulary, ())
        share = 1.0 if head is None else head.share
        self._costs = DraftCosts.of(decoder, plan.exit_layer or 0, share, plan.costs, (context,))

    def __call__(self, step: Step) -> float:
        """A round by its step."""
        costs, scored = self._costs, step.from_exit + step.refused
        if step.source == "early-exit" and scored:
            behind = max(step.drafted - step.from_exit, 0)
            return costs.round(step.from_exit, scored) + costs.rows(step.from_exit + 1, behind)
        return costs.over(step.drafted + 1)


def ratio(tokens: Counter[str], seconds: Counter[str]) -> dict[str, float]:
    speeds = {mode: tokens[mode] / seconds[mode] for mode in ("plain", "auto")}
    return {**speeds, "speedup": speeds["auto"] / speeds["plain"]}


if __name__ == "__main__":
    run(main)
