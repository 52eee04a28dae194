"""Compare training steps with and without the recipe on the same batches.

    LAYERSKIP_DATA=/path/to/data python benchmarks/training.py --output benchmarks/results/training.json

Plain is a transformers Trainer with the model's own loss; the others are LayerSkipTrainer with the same
arguments, rows and allocator settings. Each variant runs in its own process, so that its peak memory is
its own, and the variants are interleaved. `step_over_plain` is the median ratio over equal batches of
the same round. The time by part is from torch.profiler over further steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import torch
from common import deliver, environment, parse, run
from torch.autograd import DeviceType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from layerskip.data.readers import hidden_bars, read_rows
from layerskip.model.hardware import disable_cudnn_attention, keep_freed_memory, peak_memory_bytes
from layerskip.recipe import RecipeConfig
from layerskip.training import LayerSkipTrainer
from layerskip.training.data import Collator, Encoding, encode_rows
from layerskip.training.loading import pretrained, pretrained_weights

RECIPES = {
    "plain": None,
    "rotational 8": RecipeConfig.preset("task", curriculum="rotational", rotation=8),
    "2 exits": RecipeConfig.preset("task", curriculum="none", fixed_exits=(8, 15)),
}
WARM_UP_STEPS = PROFILED_STEPS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="$LAYERSKIP_DATA/topv2/*_train.tsv*")
    parser.add_argument("--prompt", default="{utterance}\n")
    parser.add_argument("--completion", default="{semantic_parse}")
    parser.add_argument(
        "--all-labels", action="store_true", help="compute the loss on prompts as well"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--variant", choices=RECIPES, help=argparse.SUPPRESS)
    options = parse(parser)
    if options.variant:
        print(json.dumps(run_variant(options)))
        return
    names, rounds = list(RECIPES), []
    for _ in range(options.rounds):
        rounds.append({name: in_own_process(name) for name in names})
        names = [*names[1:], names[0]]  # rotate the order
    result = {
        "environment": environment(
            "benchmarks/training.py",
            options.precision,
            "pytorch",
            "cuda" if torch.cuda.is_available() else "cpu",
        ),
        "batch_size": options.batch_size,
        "tokens_of_a_batch": rounds[0]["plain"]["tokens"],
        "labelled_tokens_of_a_batch": rounds[0]["plain"]["labelled_tokens"],
        "rows": [summary(name, rounds) for name in RECIPES],
    }
    deliver(result, options.output)


def in_own_process(name: str) -> dict[str, Any]:
    """Run one variant with the same command line."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--variant", name],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(name, "median step", statistics.median(figures["step_s"]), "s", file=sys.stderr)
    return figures


def summary(name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Summarize a variant over all rounds; ratios are relative to plain in the same round."""
    runs = [figures[name] for figures in rounds]
    ratios = [
        step / plain
        for figures in rounds
        for step, plain in zip(figures[name]["step_s"], figures["plain"]["step_s"], strict=True)
    ]
    seconds = [step for figures in runs for step in figures["step_s"]]
    tokens = sum(runs[0]["tokens"]) * len(runs)
    peaks = [
        figures[name]["peak_memory_bytes"] / figures["plain"]["peak_memory_bytes"]
        for figures in rounds
    ]
    return {
        "variant": name,
        "exits_of_a_step": runs[0]["exits"],
        "step_s": statistics.median(seconds),
        "step_over_plain": statistics.median(ratios),
        "step_over_plain_quartiles": statistics.quantiles(ratios, n=4)[::2],
        "tokens_per_s": tokens / sum(seconds),
        "peak_memory_bytes": statistics.median(f["peak_memory_bytes"] for f in runs),
        "peak_memory_over_plain": statistics.median(peaks),
        "loss": runs[0]["loss"],
        "where_the_time_goes_ms_a_step": {
            part: statistics.median(f["parts_ms"][part] for f in runs)
            for part in runs[0]["parts_ms"]
        },
    }


class StepClock(TrainerCallback):
    """Times optimizer steps including the update, then profiles a few more."""

    def __init__(self, steps: int) -> None:
        self._timed = range(WARM_UP_STEPS, WARM_UP_STEPS + steps)
        self._start = 0.0
        self._profiler = torch.profiler.profile(record_shapes=True)
        self.step_s: list[float] = []
        self.peak_memory_bytes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, or the profiler after the timed steps."""
        if state.global_step == self._timed.stop:
            self.peak_memory_bytes = peak_memory_bytes(args.device)
            self._profiler.start()
        self._start = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        if state.global_step - 1 in self._timed:
            self.step_s.append(self._now() - self._start)

    def parts_ms(self, vocabulary: int) -> dict[str, float]:
        """Milliseconds of a profiled step by kind of operation."""
        self._profiler.stop()
        parts: dict[str, float] = {}
        on_gpu = torch.cuda.is_available()
        for event in self._profiler.key_averages(group_by_input_shape=True):
            # GPU kernels are also events of their own; their time is counted with the operation
            # that launched them.
            if event.device_type != DeviceType.CPU:
                continue
            part = part_of(event.key, event.input_shapes, vocabulary)
            took = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            milliseconds = took / 1e3 / PROFILED_STEPS
            parts[part] = parts.get(part, 0.0) + milliseconds
        return dict(sorted(parts.items()))

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def part_of(operation: str, shapes: Sequence[Any], vocabulary: int) -> str:
    """Classify an operation; logits have V as their last dimension, weights as their first."""
    sizes = [shape for shape in shapes if shape and isinstance(shape[0], int)]
    if operation.removeprefix("aten::") in ("mm", "addmm", "bmm", "matmul", "linear", "baddbmm"):
        is_head = any(vocabulary in shape for shape in sizes)
        return "products of the head" if is_head else "products of the layers"
    if "attention" in operation:
        return "attention"
    if "_foreach_" in operation or "_fused_" in operation or operation.startswith("Optimizer"):
        return "optimizer"
    if any(shape[-1] == vocabulary for shape in sizes):
        return "softmax, loss and casts over the vocabulary"
    return "everything else"


def run_variant(options: argparse.Namespace) -> dict[str, Any]:
    """Train a few steps in this process."""
    disable_cudnn_attention(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    keep_freed_memory()
    with hidden_bars(), tempfile.TemporaryDirectory() as folder:
        trainer, clock, rows = make_trainer(options, folder)
        trainer.train()
    batches = [
        rows[start : start + options.batch_size]
        for start in range(0, len(rows), options.batch_size)
    ][clock._timed.start : clock._timed.stop]
    recipe = RECIPES[options.variant]
    collate = trainer.data_collator
    return {
        "step_s": clock.step_s,
        "peak_memory_bytes": clock.peak_memory_bytes,
        "tokens": [collate(batch)["input_ids"].numel() for batch in batches],
        "labelled_tokens": [
            int((collate(batch)["labels"][:, 1:] != -100).sum()) for batch in batches
        ],
        "exits": len(trainer.attached.exit_weights) if recipe else 1,
        "loss": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "parts_ms": clock.parts_ms(trainer.model.config.vocab_size),
    }


def make_trainer(options: argparse.Namespace, folder: str) -> tuple[Any, StepClock, list[Any]]:
    steps = WARM_UP_STEPS + options.steps + PROFILED_STEPS
    tokenizer = AutoTokenizer.from_pretrained(pretrained(options.model)[0])
    encoding = Encoding(
        tokenizer=tokenizer,
        prompt=options.prompt,
        completion=options.completion,
        completion_only=not options.all_labels,
    )
    every = encode_rows(read_rows(options.data), encoding, options.data)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [every[i] for i in order[: steps * options.batch_size]]
    name, arguments = pretrained_weights(options.model)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **arguments)
    recipe = RECIPES[options.variant]
    clock = StepClock(options.steps)
    trainer = (Trainer if recipe is None else LayerSkipTrainer)(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch_size,
            max_steps=steps,
            learning_rate=1e-5,
            bf16=options.precision == "bfloat16",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
        ),
        data_collator=Collator(tokenizer.pad_token_id or tokenizer.eos_token_id),
        train_dataset=rows,
        callbacks=[clock],
        **({} if recipe is None else {"recipe": recipe}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, clock, rows


if __name__ == "__main__":
    run(main)
