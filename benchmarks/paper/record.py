"""The result file of an experiment: one row per variant, written when it is measured."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, environment, write

RESULTS = ROOT / "benchmarks" / "results" / "paper"
# What does not decide what a row is, or is said in the row itself.
_HOW = {
    *("output", "work", "again", "smoke", "threads", "variants", "minutes"),
    *("allow_code_execution", "compile"),
}


def options_of(
    experiment: str, description: str, minutes_help: str, variants: Iterable[str] = ()
) -> argparse.ArgumentParser:
    """A parser with what all experiments share."""
    parser = argparse.ArgumentParser(prog=f"python -m paper.{experiment}", description=description)
    parser.add_argument("--output", type=Path, help=f"default: {experiment}.json in {RESULTS.name}")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "paper" / experiment)
    parser.add_argument("--minutes", type=float, help=minutes_help)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--again", action="store_true", help="measure them anew")
    parser.add_argument("--smoke", action="store_true", help="a tiny setting that ends in seconds")
    if names := list(variants):
        parser.add_argument("--variants", type=listed, default=names, help=", ".join(names))
    return parser


def listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    return [int(part) for part in listed(text)]


class Record:
    """The rows so far.

    Args:
        experiment: the module's name.
        options: all settings; those that decide what is measured have to be the same in a file.
        known: names that `--variants` may give.
    """

    def __init__(
        self, experiment: str, options: argparse.Namespace, known: Iterable[str] = ()
    ) -> None:
        if unknown := sorted(set(vars(options).get("variants", ())) - set(known)):
            raise SystemExit(f"there is no variant {unknown[0]!r}; there are: {', '.join(known)}")
        torch.set_num_threads(options.threads)
        self.experiment, self.options = experiment, options
        if options.output is None:  # a tiny setting never takes the place of what was measured
            folder = options.work if options.smoke else RESULTS
            options.output = folder / f"{experiment}.json"
        decisive = {k: v for k, v in vars(options).items() if k not in _HOW}
        settings = json.loads(json.dumps(decisive, default=str))
        self.document: dict[str, Any] = {"experiment": experiment, "smoke": options.smoke}
        self.document |= {"settings": settings, "rows": []}
        self._fresh: set[str] = set()
        if options.output.is_file():
            old = json.loads(options.output.read_text(encoding="utf-8"))
            other = [k for k in ("experiment", "smoke", "settings") if old[k] != self.document[k]]
            if other and not options.again:
                sys.exit(
                    f"{options.output} was measured with other {other[0]}; --again begins it anew"
                )
            self.document = self.document if other else old

    def lacks(self, variant: str) -> bool:
        """Return True if a variant has not been measured."""
        if self.options.again and variant not in self._fresh:
            return True
        return variant not in {row["variant"] for row in self.document["rows"]}

    def add(self, variant: str, row: dict[str, Any], kernels: str | None = None) -> None:
        """Add what was measured of a variant, or replace it, and write the file whole."""
        here = environment(f"-m paper.{self.experiment}", self.options.dtype, kernels)
        others = [old for old in self.document["rows"] if old["variant"] != variant]
        self.document["rows"] = [*others, {"variant": variant, **row, "environment": here}]
        self._fresh.add(variant)
        write(self.document, self.options.output)
        print(f"{self.experiment}: {variant} is measured, {self.options.output}", flush=True)
