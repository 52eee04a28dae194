"""Predicted outputs: speed over plain decoding where 90% of a prediction is right, and where nothing is.

The predictions are made of plain decoding's answers: in one set one word in ten is replaced, in runs of
1 to 6 words; in the other the words stand in reverse order. Rows are interleaved on each prompt.
"""

import argparse
import contextlib
import random
import re
from collections.abc import Callable

from common import cpu_clock, deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.measure import measure
from layerskip.bench.rows import row
from layerskip.bench.systems import LayerSkipSystem, settings_of
from layerskip.bench.tasks import load_task

MAX_RUN = 6  # words replaced at once
REPLACED = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", default="16bit")
    parser.add_argument("--task", default="mbpp")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--cpu-seconds", action="store_true", help="see edits.py")
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, dtype="bfloat16", weights=options.weights)
    task = load_task(options.task, samples=options.samples, judged=False)
    prompts = [model.tokenize(sample.prompt) for sample in task.samples]
    plain, auto, *_, alone, beside = settings_of(
        model, modes=("auto",), sources=True, stop=task.stop, with_predictions=True
    )
    n = options.max_new_tokens
    (first,) = measure([LayerSkipSystem(model, [plain])], prompts, max_new_tokens=n)
    answers = [of_prompt[0].text for of_prompt in first.runs]
    sets: dict[str, Callable[[str], str]] = {"90% right": partly_right, "nothing right": wrong}
    systems = [LayerSkipSystem(model, [plain, auto])]
    for make in sets.values():
        predictions = {
            tuple(prompt): make(answer) for prompt, answer in zip(prompts, answers, strict=True)
        }
        systems.append(LayerSkipSystem(model, [alone, beside], predictions=predictions))
    with cpu_clock() if options.cpu_seconds else contextlib.nullcontext():
        entries = measure(systems, prompts, max_new_tokens=n)
    names = [None, None, *(name for name in sets for _ in (alone, beside))]
    rows = [
        {"prediction": name, **row(entry, plain=entries[0].runs, prompts=prompts)}
        for name, entry in zip(names, entries, strict=True)
    ]
    environment = environment_of("benchmarks/predictions.py", model)
    clock = "CPU seconds" if options.cpu_seconds else "seconds"
    about = {"model": options.model, "task": task.name, "samples": len(prompts), "clock": clock}
    deliver({"environment": environment, **about, "rows": rows}, options.output)


def partly_right(answer: str) -> str:
    """Replace one word in ten."""
    chooser = random.Random(0)
    parts = re.split(r"(\s+)", answer)
    words = parts[::2]
    due = round(REPLACED * len(words))
    while due > 0:
        length = min(chooser.randint(1, MAX_RUN), due)
        start = chooser.randrange(len(words))
        for i in range(start, min(start + length, len(words))):
            words[i] = chooser.choice(words)
        due -= length
    parts[::2] = words
    return "".join(parts)


def wrong(answer: str) -> str:
    """Reverse the words."""
    return " ".join(answer.split()[::-1])


if __name__ == "__main__":
    run(main)
