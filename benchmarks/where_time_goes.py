"""Where the time of an answer goes in mode auto, in plain steps: a profile for what is not fast enough.

    LAYERSKIP_DATA=data python benchmarks/where_time_goes.py --model smollm2-135m-layerskip \\
        --task topv2,humaneval --weights 16bit,int8 --output benchmarks/results/where-time-goes.json

Each prompt is answered plainly and in auto, in turns. Of auto every token costs so much drafting, so
much of the layers that verify (or take a plain step), of the whole head, and of all else, which is
Python; one over their sum is the speedup. The parts are timed where the loop calls the decoder.
"""

import argparse
import contextlib
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from engine import deliver, environment_of, parsed, run
from torch import Tensor

from layerskip import LayerSkipModel
from layerskip.bench.tasks import Task, load_task
from layerskip.decoding import Step
from layerskip.model import Decoder, KVCache
from layerskip.model.quantize import WEIGHTS

PARTS = ("draft", "layers", "head", "rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, help="several with commas")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="several with commas")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parsed(parser)
    lines = []
    for weights in options.weights.split(","):
        model = LayerSkipModel.from_pretrained(options.model, weights=weights)
        for name in options.task.split(","):
            chat = model.has_chat_template
            task = load_task(name, samples=options.samples, seed=0, chat=chat, judged=False)
            found = profile(model, task, min(options.max_new_tokens, task.max_new_tokens))
            lines.append({"task": name, "weights": weights, **found})
            print(name, weights, file=sys.stderr, flush=True)
    here = environment_of("benchmarks/where_time_goes.py", model, options.weights)
    deliver({"environment": here, "model": options.model, "lines": lines}, options.output)


def profile(model: LayerSkipModel, task: Task, max_new_tokens: int) -> dict[str, Any]:
    """Plain and auto over the same prompts in turns; the first prompt is answered once to warm up."""
    prompts = [sample.prompt for sample in task.samples]
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": task.stop}
    spent = {mode: defaultdict[str, float](float) for mode in ("plain", "auto")}
    steps: dict[str, list[Step]] = {mode: [] for mode in spent}
    for number, prompt in enumerate([prompts[0], *prompts]):
        for mode in spent:
            parts = defaultdict[str, float](float)
            with timed(model.decoder, parts):
                made = model.generate(prompt, mode=mode, **how)
            if number:
                del parts["prompt"]
                parts["rest"] = made.decode_s - sum(parts.values())
                for part, seconds in parts.items():
                    spent[mode][part] += seconds
                steps[mode] += made.steps[1:]  # the first comes with the prompt
    tokens = {mode: sum(len(step.tokens) for step in made) for mode, made in steps.items()}
    if not all(tokens.values()):
        sys.exit("answers of one token: there is nothing to measure")
    step_s = sum(spent["plain"].values()) / tokens["plain"]
    rounds = len(steps["auto"])
    drafting = [step for step in steps["auto"] if step.drafted]
    drafted = sum(step.drafted for step in drafting)
    return {
        "plain_ms_a_token": {part: 1e3 * spent["plain"][part] / tokens["plain"] for part in PARTS},
        "auto_plain_steps_a_token": {
            part: spent["auto"][part] / tokens["auto"] / step_s for part in PARTS
        },
        "speedup": step_s * tokens["auto"] / sum(spent["auto"].values()),
        "tokens_a_round": tokens["auto"] / rounds,
        "rounds_that_draft": len(drafting) / rounds,
        "drafted_a_drafting_round": drafted / max(len(drafting), 1),
        "accepted": sum(step.accepted for step in drafting) / max(drafted, 1),
        "tokens_an_answer": tokens["auto"] / len(prompts),
    }


@contextlib.contextmanager
def timed(decoder: Decoder, spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of a decoder's calls to `spent`; calls inside of others count for these.

    All up to the first choice of a token is the prompt's.
    """
    kind, n_layers = type(decoder), len(decoder.layers)
    inside = answering = False

    def of_run(hidden: Tensor, start: int, stop: int, cache: KVCache) -> str:
        return "draft" if stop < n_layers else "layers"

    def watched(method: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(self: Decoder, *args: Any, **options: Any) -> Any:
            nonlocal inside, answering
            if inside:
                return method(self, *args, **options)
            part = name(*args, **options)
            inside, begin = True, time.perf_counter()
            try:
                return method(self, *args, **options)
            finally:
                spent[part if answering else "prompt"] += time.perf_counter() - begin
                inside, answering = False, answering or part == "head"

        return call

    names: dict[str, Callable[..., str]] = {
        "run": of_run,
        "choose": lambda *_: "head",
        "draft": lambda *_, **__: "draft",
    }
    with contextlib.ExitStack() as patches:
        for whole in ("step", "verify"):  # in their parts
            patches.enter_context(mock.patch.object(kind, whole, getattr(Decoder, whole)))
        for method, name in names.items():
            patched = watched(getattr(kind, method), name)
            patches.enter_context(mock.patch.object(kind, method, patched))
        yield


if __name__ == "__main__":
    run(main)
