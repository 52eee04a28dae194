"""Measurements of a checkpoint: perplexity of its exits, acceptance and speed of its drafts."""

from collections.abc import Sequence
from typing import Any

from layerskip import LayerSkipModel
from layerskip.bench.bench import BenchConfig, bench
from layerskip.bench.perplexity import perplexity
from layerskip.bench.tasks import Task
from layerskip.tune.predict import Continuation, agreement_rate, read_agreement, replay


def exits_of(
    model: LayerSkipModel, text: str, window: int, exits: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Perplexity, bits per byte and token accuracy of exits (None: all) on a text."""
    exits = exits or range(1, len(model.decoder.layers) + 1)
    results = perplexity(model, text, exits, window=window, stride=window)
    return [
        {"exit_layer": e} | {name: metric.to_dict()["value"] for name, metric in metrics.items()}
        for e, metrics in results.items()
    ]


def drafting(
    model: LayerSkipModel,
    task: Task,
    source: str,
    *,
    exits: Sequence[int],
    timed_exits: Sequence[int],
    draft_tokens: Sequence[int],
    max_new_tokens: int,
    repeats: int = 1,
) -> dict[str, Any]:
    """Measure acceptance and speed of drafts on the prompts of a task.

    Args:
        model: the checkpoint.
        task: its prompts.
        source: the checkpoint's name.
        exits: whose agreement with the last layer is read, in one pass over the greedy answers.
        timed_exits: E of real self-speculative decoding, each at every d, in turns with plain decoding.
        draft_tokens: every d.
        max_new_tokens: of an answer.
        repeats: how often the prompts are gone through for the times.

    Returns:
        `exits`: for each E the agreement, and for each d the acceptance of replayed answers. `timed`:
        rows of `bench`. `plain`: speed and quality of plain decoding.
    """
    continuations = answers(model, task, exits, max_new_tokens)
    config = BenchConfig(
        modes=("self-speculative",),
        exit_layers=timed_exits,
        draft_tokens=draft_tokens,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
    )
    plain, *rows = bench(model, task, config, source=source)["rows"]
    kept = (
        *("exit_layer", "draft_tokens", "speedup", "speedup_interval", "tokens_per_s"),
        *("acceptance_rate", "mean_accepted_length", "accepted_by_position", "identical_to_plain"),
    )
    return {
        "task": task.name,
        "samples": len(task.samples),
        "max_new_tokens": max_new_tokens,
        "plain": {name: plain[name] for name in ("tokens_per_s", "new_tokens", "quality")},
        "exits": [_exit(continuations, e, draft_tokens) for e in exits],
        "timed": [{name: row[name] for name in kept} for row in rows],
    }


def answers(
    model: LayerSkipModel, task: Task, exits: Sequence[int], max_new_tokens: int
) -> list[Continuation]:
    """Plain greedy answers of 2 tokens or more, and what the exits would have said along them."""
    continuations = []
    for sample in task.samples:
        prompt = model.tokenize(sample.prompt)
        if len(prompt) + max_new_tokens > model.decoder.architecture.max_context:
            continue
        output = model.generate(prompt, mode="plain", max_new_tokens=max_new_tokens, stop=task.stop)
        if output.new_tokens > 1:
            continuations.append(
                read_agreement(model.decoder, prompt, output.token_ids, exits, max_new_tokens)
            )
    if not continuations:
        raise ValueError(f"no prompt of {task.name} was answered with more than one token")
    return continuations


def _exit(
    continuations: Sequence[Continuation], exit_layer: int, draft_tokens: Sequence[int]
) -> dict[str, Any]:
    lengths = []
    for d in draft_tokens:
        rounds = [step for c in continuations for step in replay(c, exit_layer, d)]
        drafted = sum(step.drafted for step in rounds)
        lengths.append(
            {
                "draft_tokens": d,
                "acceptance_rate": sum(s.accepted for s in rounds) / drafted if drafted else None,
                "mean_accepted_length": sum(len(s.tokens) for s in rounds) / len(rounds),
            }
        )
    agreement = agreement_rate(continuations, exit_layer)
    return {"exit_layer": exit_layer, "agreement": agreement, "by_draft_tokens": lengths}
