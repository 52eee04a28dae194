"""Ablation of exit adapters: short trainings of equal time, one change each, measured on Spec-Bench.

Each variant trains for --minutes from its ridge start, data included, in a process of its own. Then its
agreement with the model is measured on the model's greedy answers to Spec-Bench prompts, and each source
of drafts is decoded against plain decoding on them. No prompt of Spec-Bench may be in --data.
"""

import argparse
import dataclasses
import math
import multiprocessing
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import deliver, environment, parse, run
from torch import Tensor

from layerskip import LayerSkipModel
from layerskip.adapt import AdaptConfig, adapt, network, report, ridge, train
from layerskip.adapt.agreement import measure_agreement
from layerskip.adapt.teacher import write_answers
from layerskip.bench.tasks import load_task
from layerskip.decoding import DecodingConfig, exit_adapter
from layerskip.fileio import read_json, replace_json
from layerskip.model import exit_adapter as adapter_files
from layerskip.model import open_files, resolve
from layerskip.model.architecture import Architecture

BASE: dict[str, Any] = {"exit_layer": 2, "own_share": 0.3}
# Name -> settings, besides those of BASE. `previous` and `layers` are not settings of `adapt`.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "E = 0": {"exit_layer": 0},
    "E = 4": {"exit_layer": 4},
    "without the last layer's state": {"previous": False},
    "without the last layer's state, E = 4": {"previous": False, "exit_layer": 4},
    "two layers": {"layers": 2},
    "4,096 tokens": {"draft_vocabulary": 4096},
    "16,384 tokens": {"draft_vocabulary": 16384},
    "depth 1": {"depths": 1},
    "depth 3": {"depths": 3},
    "texts only": {"own_share": 0.0},
    "own answers only": {"own_share": 1.0},
    "base, another seed": {"seed": 1},
}


def without_previous(exit_states: Tensor, previous: Tensor) -> Tensor:
    """`exit_adapter.joined` with zeros for the state of the last layer."""
    return torch.cat([adapter_files.normalized(exit_states), torch.zeros_like(previous)], dim=-1)


def deeper(n_layers: int) -> tuple[Any, Any]:
    """Return `adapter_architecture` and `initial_parameters` of an adapter of so many layers."""
    one, first = adapter_files.adapter_architecture, network.initial_parameters

    def architecture(base: Architecture, logit_scale: float = 1.0) -> Architecture:
        a = one(base, logit_scale)
        windows, ropes = a.sliding_windows * n_layers, a.ropes * n_layers
        return dataclasses.replace(a, n_layers=n_layers, sliding_windows=windows, ropes=ropes)

    def parameters(files: Any, projection: Tensor, seed: int = 0) -> dict[str, Tensor]:
        tensors = first(files, projection, seed)
        for name in [name for name in tensors if ".0." in name]:
            for i in range(1, n_layers):
                tensors[name.replace(".0.", f".{i}.", 1)] = tensors[name].clone()
        return tensors

    return architecture, parameters


def train_variant(
    name: str, settings: dict[str, Any], options: argparse.Namespace, folder: Path
) -> None:
    """Train and measure one variant; write its result into the folder."""
    torch.set_num_threads(options.threads)
    settings = {**BASE, **settings}
    if not settings.pop("previous", True):
        for module in (exit_adapter, network, ridge):
            mock.patch.object(module, "joined", without_previous).start()
    if (n_layers := settings.pop("layers", 1)) > 1:
        architecture, parameters = deeper(n_layers)
        for module in (adapter_files, network):
            mock.patch.object(module, "adapter_architecture", architecture).start()
        mock.patch.object(train, "initial_parameters", parameters).start()
    mock.patch.object(train, "measure_sources", return_value=[]).start()
    config = AdaptConfig(
        output=folder,
        data=tuple(options.data),
        max_minutes=options.minutes,
        round_tokens=12_000,
        eval_prompts=16,
        patience=1000,
        save_minutes=60.0,
        resume=True,
        **settings,
    )
    result = adapt(options.model, config, weights=options.weights)
    model = load_model(folder, options)
    row = {
        "variant": name,
        "settings": settings,
        "minutes": result.minutes,
        "tokens": result.tokens,
        "passes": result.passes,
        "agreement_held_out": result.agreement.by_depth,
        **measured(model, folder, options),
        "history": result.history,
    }
    replace_json(folder / "result.json", row)


def load_model(folder: Path, options: argparse.Namespace) -> LayerSkipModel:
    """Load the base with the adapter of a folder."""
    return LayerSkipModel.from_pretrained(
        options.model, weights=options.weights, adapter=str(folder)
    )


def bytes_of_a_draft(model: LayerSkipModel) -> float:
    """Return the bytes that a draft reads, as a share of those of a plain step."""
    assert model.adapter is not None
    decoder, adapter = model.decoder, model.adapter
    depth = adapter.settings.exit_layer / len(decoder.layers)
    layers = depth * (decoder.weight_bytes - decoder.head_bytes)
    head = exit_adapter.draft_head(adapter).decoder.head_bytes
    return (layers + adapter.weight_bytes + head) / decoder.weight_bytes


def measured(model: LayerSkipModel, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return size, cost, agreement and speedups on Spec-Bench of an adapter."""
    task = load_task("spec_bench", samples=options.samples)
    prompts = [model.tokenize(sample.prompt) for sample in task.samples]
    decoder = model.decoder
    tensors, settings, ids = adapter_files.read_adapter(folder / adapter_files.ADAPTER_FILE)
    answers = write_answers(
        decoder,
        prompts,
        settings.exit_layer,
        DecodingConfig(mode="plain", max_new_tokens=options.max_new_tokens),
        eos_token_ids=model.end_tokens,
    )
    trained = network.AdapterNetwork(decoder, tensors, math.log(settings.logit_scale))
    head_rows = network.head_rows(open_files(resolve(options.model)), ids)
    agreement = measure_agreement(trained, answers, head_rows, ids)
    speeds = report.measure_sources(model, prompts, options.max_new_tokens)
    return {
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes_of_a_draft": bytes_of_a_draft(model),
        "agreement": agreement.by_depth,
        "accepted_of_4": agreement.accepted,
        "speedups": [dataclasses.asdict(speed) for speed in speeds],
    }


def main() -> None:
    """Run all variants one after another; finished ones are read from --folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="stored")
    parser.add_argument("--data", nargs="+", default=["python"])
    parser.add_argument("--folder", type=Path, default=Path("runs/adapter-ablation"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    options = parse(parser)
    details = environment("benchmarks/adapter_ablation.py", "bfloat16", "compiled")
    rows = []
    for number, (name, settings) in enumerate(VARIANTS.items()):
        folder = options.folder / str(number)
        if not (folder / "result.json").is_file():
            arguments = (name, settings, options, folder)
            process = multiprocessing.get_context("spawn").Process(
                target=train_variant, args=arguments
            )
            process.start()
            process.join()
            if process.exitcode:
                raise ValueError(f"variant {name!r} failed")
        rows.append(read_json(folder / "result.json"))
        print(name, rows[-1]["agreement"], rows[-1]["speedups"], flush=True)
    deliver({"environment": details, "model": options.model, "rows": rows}, options.output)


if __name__ == "__main__":
    run(main)
