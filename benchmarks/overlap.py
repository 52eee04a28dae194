"""How many test rows also stand in the rows to train on: of TOPv2, and of package descriptions.

    LAYERSKIP_DATA=data python benchmarks/overlap.py --output benchmarks/results/overlap.json

TOPv2's files are counted as they are. Descriptions are those that examples/checkpoint/prepare.py holds
back, which keeps apart what begins alike.
"""

import argparse
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

from engine import deliver, environment, parsed, run

sys.path.append(str(Path(__file__).parents[1] / "examples" / "checkpoint"))

from mixture_sources import SOURCES, summary_prompt


def main() -> None:
    options = parsed(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    here = environment("benchmarks/overlap.py", "float32")
    commands, held_back = ([row["prompt"] for row in rows] for rows in SOURCES["topv2"].read(None))
    same = shared(held_back, commands)
    alike = shared(held_back, commands, lambda text: " ".join(text.lower().split()))
    end = summary_prompt("")
    known, asked = (
        [row["prompt"].removesuffix(end) for row in rows] for rows in SOURCES["debian"].read(None)
    )
    result = {
        "environment": here,
        "topv2": {
            "train_rows": len(commands),
            "test_rows": len(held_back),
            "word_for_word": same,
            "but_for_capitals_and_spaces": alike - same,
        },
        "descriptions": {
            "train_rows": len(known),
            "held_back": len(asked),
            "one_begins_with_the_other": begun(asked, known),
        },
    }
    deliver(result, options.output)


def shared(
    asked: Sequence[str], known: Sequence[str], form: Callable[[str], str] = lambda text: text
) -> int:
    """How many of some texts are among others, in a form of both."""
    forms = {form(text) for text in known}
    return sum(form(text) in forms for text in asked)


def begun(asked: Sequence[str], known: Sequence[str]) -> int:
    """How many of some texts begin with a whole one of others, or are the beginning of one."""
    whole, in_order = set(known), sorted(known)

    def is_known(text: str) -> bool:
        longer = bisect_left(in_order, text)
        begins_one = longer < len(in_order) and in_order[longer].startswith(text)
        return begins_one or any(text[:n] in whole for n in range(1, len(text)))

    return sum(map(is_known, asked))


if __name__ == "__main__":
    run(main)
