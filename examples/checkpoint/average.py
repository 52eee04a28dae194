"""A checkpoint between two others: what training changed, a part of it taken back.

    python examples/checkpoint/average.py runs/checkpoint smollm2-135m runs/average --share 0.75

Long training on few tasks makes a model forget the rest. Between its weights and those that training
began with lies a model that still does the tasks and has its general language back (arXiv 2109.01903);
some more training then mends the exits, which suffer most.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

from layerskip.model.checkpoint import KEY, recorded
from layerskip.training.loading import pretrained_model


def main() -> None:
    """Read the command line and average."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of the trained model")
    parser.add_argument("base", help="what its training began with: a folder or a built-in name")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--share", type=float, default=0.75, help="of what training changed")
    options = parser.parse_args()
    try:
        average(options.checkpoint, options.base, options.output, options.share)
    except (ValueError, OSError) as error:
        sys.exit(f"average.py: {error}")


def average(checkpoint: Path, base: str, output: Path, share: float = 0.75) -> None:
    """Write base + share * (checkpoint - base), with the checkpoint's other files and `average.json`.

    Raises:
        ValueError: the share is not from 0 to 1, the folder is there, or the models differ in shape.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share is {share}; it must be from 0 to 1")
    if output.exists():
        raise ValueError(f"{output} is there already; name a new folder")
    trained = pretrained_model(str(checkpoint))
    start = pretrained_model(base).state_dict()
    for name, weight in trained.state_dict().items():
        if name not in start or start[name].shape != weight.shape:
            raise ValueError(f"{base} has no {name} of this shape: {checkpoint} began elsewhere")
    with torch.no_grad():
        for name, parameter in trained.named_parameters():  # a tied head is there once
            parameter.lerp_(start[name], 1 - share)
    shutil.copytree(
        checkpoint,
        output,
        ignore=lambda _, names: [n for n in names if not n.endswith((".json", ".jsonl", ".jinja"))],
    )
    note = json.dumps({"base": base, "share": share}) + "\n"
    (output / "average.json").write_text(note, encoding="utf-8")
    settings = trained.generation_config
    if own := getattr(settings, KEY, None):
        setattr(settings, KEY, recorded(own, {}))  # what 8 and 4 bits cost was the trained weights'
    trained.save_pretrained(output)


if __name__ == "__main__":
    main()
