"""Speed of drafts from texts that are known beforehand: edits, and predicted outputs.

    python benchmarks/edits.py edits --model qwen2.5-coder-0.5b.gguf --output edits.json
    LAYERSKIP_DATA=data python benchmarks/edits.py predictions --model qwen2.5-coder-0.5b.gguf \\
        --output predictions.json

`edits`: task `edits` of `layerskip bench`, where most of an answer stands in the prompt.

`predictions`: predicted outputs, made of all that plain decoding generates, stop strings included: in
one set one word in ten is replaced, in runs of 1 to 6 words; in the other the words stand in reverse
order. Rows are interleaved on each prompt.
"""

import argparse
import random
import re
from collections.abc import Callable
from typing import Any

from common import comma_separated, deliver, environment_of, parse, run

from layerskip import LayerSkipModel
from layerskip.bench.bench import bench
from layerskip.bench.measure import measure
from layerskip.bench.rows import row
from layerskip.bench.systems import BenchConfig, LayerSkipSystem, settings_of
from layerskip.bench.tasks import load_task

MAX_RUN = 6  # words replaced at once
REPLACED = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurement", choices=["edits", "predictions"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", default="16bit")
    parser.add_argument("--task", default="mbpp", help="of predictions")
    parser.add_argument("--samples", type=int, help="default: 30 edits, 8 predictions")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument(
        "--baselines", type=comma_separated, default=[], help="of edits: other programs"
    )
    parser.add_argument(
        "--sources", action="store_true", help="of edits: rows for each draft source"
    )
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, dtype="bfloat16", weights=options.weights)
    measure_it = edits if options.measurement == "edits" else predictions
    result = measure_it(model, options)
    deliver({**result, "environment": environment_of("benchmarks/edits.py", model)}, options.output)


def edits(model: LayerSkipModel, options: argparse.Namespace) -> dict[str, Any]:
    """Measure mode auto on edits of Python files."""
    config = BenchConfig(
        task="edits",
        modes=("auto",),
        sources=options.sources,
        baselines=tuple(options.baselines),
        max_new_tokens=options.max_new_tokens,
    )
    task = load_task("edits", samples=options.samples or 30, chat=True)
    return bench(model, task, config, source=options.model)


def predictions(model: LayerSkipModel, options: argparse.Namespace) -> dict[str, Any]:
    """Measure drafts from predictions of which 90% is right, and of which nothing is."""
    task = load_task(options.task, samples=options.samples or 8, judged=False)
    prompts = [model.tokenize(sample.prompt) for sample in task.samples]
    plain, auto, *_, alone, beside = settings_of(
        model, modes=("auto",), sources=True, stop=task.stop, with_predictions=True
    )
    n = options.max_new_tokens
    (first,) = measure([LayerSkipSystem(model, [plain])], prompts, max_new_tokens=n)
    answers = [
        model.tokenizer.decode(of_prompt[0].token_ids, skip_special_tokens=True)
        for of_prompt in first.runs
    ]
    sets: dict[str, Callable[[str], str]] = {"90% right": partly_right, "nothing right": wrong}
    systems = [LayerSkipSystem(model, [plain, auto])]
    for make in sets.values():
        by_prompt = {
            tuple(prompt): make(answer) for prompt, answer in zip(prompts, answers, strict=True)
        }
        systems.append(LayerSkipSystem(model, [alone, beside], predictions=by_prompt))
    entries = measure(systems, prompts, max_new_tokens=n)
    names = [None, None, *(name for name in sets for _ in (alone, beside))]
    rows = [
        {**row(entry, plain=entries[0].runs, prompts=prompts), "prediction": name}
        for name, entry in zip(names, entries, strict=True)
    ]
    return {"model": options.model, "task": task.name, "samples": len(prompts), "rows": rows}


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
