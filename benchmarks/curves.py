"""Measure speed against context length, number of verified positions, and batch size.

    LAYERSKIP_DATA=data python benchmarks/curves.py --model runs/topv2 --task topv2 \\
        --output benchmarks/results/curves.json

Context: plain decoding with unquantized weights, 32 tokens up to each length, and the prefill before.
Verification: all layers and the head over n positions after 192 others, for each kind of weights and
number of threads. Batch: prompts of the task in one call, prefill included. The points of a curve are
interleaved; each is a median over the rounds. With --output a plot is written beside the file.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, deliver, environment_of, interleaved, ms_of, parse, run, verify

from layerskip import LayerSkipModel
from layerskip.bench.tasks import Task, load_task

CONTEXTS = (128, 512, 1024, 2048, 4096, 8192)
DECODED = 32  # tokens after a prompt; both together are the context
POSITIONS = range(1, 17)
BATCHES = (1, 2, 4, 8, 16)
MAX_NEW_TOKENS = 64  # of an answer in a batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="topv2", help="prompts of the batches")
    parser.add_argument("--weights", default="16bit,int8,int4")
    parser.add_argument("--rounds", type=int, default=3)
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model)
    result: dict[str, Any] = {
        "environment": environment_of("benchmarks/curves.py", model),
        "model": options.model,
        "context": context_curve(model, options.rounds),
        "batch": batch_curve(model, options.task, options.rounds),
    }
    result["verify_ms"] = {
        weights: {
            f"{threads} thread{'s' * (threads > 1)}": milliseconds
            for threads, milliseconds in verify_curves(options, weights)
        }
        for weights in options.weights.split(",")
    }
    deliver(result, options.output)
    if options.output:
        draw({"": result}, options.output.with_suffix(".png"))


def context_curve(model: LayerSkipModel, rounds: int) -> list[dict[str, float]]:
    """Tokens/s of decoding and of the prefill at each context length that the model supports."""
    text = model.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"), verbose=False)
    text = list(itertools.islice(itertools.cycle(text), max(CONTEXTS)))
    lengths = [n for n in CONTEXTS if n <= model.decoder.architecture.max_context]

    def speeds(context: int) -> tuple[float, float]:
        prompt = text[: context - DECODED]
        answer = model.generate(prompt, mode="plain", max_new_tokens=DECODED, ignore_eos=True)
        return answer.tokens_per_s, len(prompt) / answer.ttft_s

    speeds(lengths[0])
    runs = [[speeds(context) for context in lengths] for _ in range(rounds)]
    curve = []
    for context, found in zip(lengths, zip(*runs, strict=True), strict=True):
        tokens, prompt_tokens = (statistics.median(figure) for figure in zip(*found, strict=True))
        curve.append(
            {"context": context, "tokens_per_s": tokens, "prompt_tokens_per_s": prompt_tokens}
        )
    return curve


def batch_curve(model: LayerSkipModel, name: str, rounds: int) -> list[dict[str, Any]]:
    """Tokens/s of whole batches in modes plain, auto and, with a trained exit, self-speculative."""
    task = load_task(name, samples=max(BATCHES), chat=model.has_chat_template, judged=False)
    trained = ["self-speculative"] if model.settings.exit_layer is not None else []
    modes = ("plain", *trained, "auto")
    points = [(size, mode) for size in BATCHES for mode in modes]
    for point in points[: len(modes)]:
        _throughput(model, task, *point)
    speeds = {point: partial(_throughput, model, task, *point) for point in points}
    return [
        {"batch": size, "mode": mode, "tokens_per_s": speed}
        for (size, mode), speed in interleaved(speeds, rounds, warm_ups=0).items()
    ]


def _throughput(model: LayerSkipModel, task: Task, size: int, mode: str) -> float:
    """Tokens/s over all prompts of the task, `size` at a time."""
    limit = min(task.max_new_tokens, MAX_NEW_TOKENS)
    prompts = [sample.prompt for sample in task.samples]
    tokens, begin = 0, time.perf_counter()
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        answers = model.generate(batch, mode=mode, max_new_tokens=limit, stop=task.stop)
        tokens += sum(answer.new_tokens for answer in answers)
    return tokens / (time.perf_counter() - begin)


def verify_curves(
    options: argparse.Namespace, weights: str
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield milliseconds by number of positions, for 1 thread and for --threads."""
    decoder = LayerSkipModel.from_pretrained(options.model, weights=weights).decoder
    for threads in sorted({1, options.threads}):
        torch.set_num_threads(threads)
        cache = decoder.new_cache(256)
        passes = {str(n): partial(ms_of, verify, decoder, cache, n) for n in POSITIONS}
        yield threads, interleaved(passes, 8 * options.rounds)
    torch.set_num_threads(options.threads)


def draw(results: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Plot the three curves of each result side by side; the keys of `results` are row titles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 3, squeeze=False)
    for (name, result), (context, passes, batch) in zip(results.items(), grid, strict=True):
        points = result["context"]
        context.plot([p["context"] for p in points], [p["tokens_per_s"] for p in points], "o-")
        context.set_xscale("log", base=2)
        context.set(xlabel="context, tokens", ylabel="tokens/s", title=f"{name} plain, unquantized")
        for number, (weights, by_threads) in enumerate(result["verify_ms"].items()):
            for threads, cost in by_threads.items():
                style = "--" if threads == "1 thread" else "-"
                label = f"{weights}, {threads}"
                ns = [int(n) for n in cost]
                passes.plot(ns, list(cost.values()), style, color=f"C{number}", label=label)
        passes.set(xlabel="positions of a pass", ylabel="ms", title="Verification")
        for mode in dict.fromkeys(p["mode"] for p in result["batch"]):
            own = [p for p in result["batch"] if p["mode"] == mode]
            batch.plot(
                [p["batch"] for p in own], [p["tokens_per_s"] for p in own], "o-", label=mode
            )
        batch.set_xscale("log", base=2)
        batch.set(xlabel="batch size", ylabel="tokens/s of the batch", title="Batches")
        passes.legend()
        batch.legend()
        for axes in (context, passes, batch):
            axes.set_ylim(bottom=0)
    FigureCanvasAgg(figure).print_png(file)


if __name__ == "__main__":
    run(main)
