"""What a long draft text brings: auto and n-grams alone, with a table of `layerskip index` and without.

    layerskip index commands.table --data rows.jsonl
    LAYERSKIP_DATA=data python benchmarks/draft_texts.py --model smollm2-135m-layerskip --task topv2 \\
        --table commands.table --weights 16bit,int8 --output benchmarks/results/draft-texts.json

Each prompt is answered in every way, one after the other, so that a machine whose speed goes up and
down does so to all. Speeds are tokens after the first over their time, totals of all prompts. `auto`
without the table has the checkpoint's own draft text, if there is one, and n-grams once with it and once
with prompt and answer alone.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from engine import deliver, environment_of, parsed, run
from numpy.typing import NDArray

from layerskip import Generation, LayerSkipModel
from layerskip.bench.rows import bootstrap_interval
from layerskip.bench.tasks import Task, load_task
from layerskip.decoding.draft_text import Datastore
from layerskip.model.quantize import WEIGHTS

NGRAMS = {"draft_from": "n-gram"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", required=True, help="several with commas")
    parser.add_argument("--table", required=True, type=Path, help="of `layerskip index`")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="several with commas")
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--max-new-tokens", type=int, help="at most, beside the task's own limit")
    options = parsed(parser)
    ways: Mapping[str, dict[str, Any]] = {
        "plain": {"mode": "plain"},
        "auto": {},
        "auto, table": {"draft_text": options.table},
        "n-grams": {**NGRAMS, "draft_text": ()},
        "n-grams, own text": NGRAMS,
        "n-grams, table": {**NGRAMS, "draft_text": options.table},
    }
    lines = []
    for weights in options.weights.split(","):
        model = LayerSkipModel.from_pretrained(options.model, weights=weights)
        for name in options.task.split(","):
            task = load_task(
                name, samples=options.samples, seed=0, chat=model.has_chat_template, judged=False
            )
            most = min(task.max_new_tokens, options.max_new_tokens or task.max_new_tokens)
            line = {"weights": weights, "task": task.name, **measured(model, task, most, ways)}
            lines.append(line)
            print(weights, task.name, line["ways"], file=sys.stderr, flush=True)
    runs = len(Datastore.load(options.table, model.decoder.architecture.vocab_size))
    here = environment_of("benchmarks/draft_texts.py", model, options.weights)
    deliver(
        {"environment": here, "model": options.model, "runs": runs, "lines": lines}, options.output
    )


def measured(
    model: LayerSkipModel, task: Task, most: int, ways: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """All ways on the task's prompts; the first is answered once before, to warm up."""
    answers: dict[str, list[Generation]] = {way: [] for way in ways}
    for number, sample in enumerate((task.samples[0], *task.samples)):
        for way, options in ways.items():
            answer = model.generate(sample.prompt, max_new_tokens=most, stop=task.stop, **options)
            if number:
                answers[way].append(answer)
    plain = answers["plain"]
    return {
        "samples": len(task.samples),
        "max_new_tokens": most,
        "new_tokens": sum(answer.new_tokens for answer in plain),
        "ways": {way: compared(made, plain) for way, made in answers.items()},
    }


def compared(made: Sequence[Generation], plain: Sequence[Generation]) -> dict[str, Any]:
    """Speed of some answers, against plain decoding's."""
    drafted = sum(answer.drafted or 0 for answer in made)
    columns = np.array([[f(a) for a in of] for of in (made, plain) for f in (after_first, seconds)])
    rounds = sum(answer.rounds or 0 for answer in made)
    tokens = sum(map(after_first, made))
    same = sum(a.token_ids == b.token_ids for a, b in zip(made, plain, strict=True))
    return {
        "tokens_per_s": tokens / sum(map(seconds, made)),
        "speedup": float(ratio(columns)),
        "speedup_interval": bootstrap_interval(columns, ratio),
        "tokens_a_round": tokens / rounds if rounds else None,
        "acceptance_rate": sum(a.accepted or 0 for a in made) / drafted if drafted else None,
        "identical_to_plain": same / len(made),
    }


def after_first(answer: Generation) -> float:
    return answer.new_tokens - 1.0


def seconds(answer: Generation) -> float:
    return answer.decode_s


def ratio(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of totals: tokens, seconds, plain decoding's tokens and its seconds."""
    tokens, took, plain_tokens, plain_took = columns.sum(axis=-1)
    return np.asarray((tokens / took) / (plain_tokens / plain_took))


if __name__ == "__main__":
    run(main)
