"""Mix several data sets into one training file, and hold rows of each task back.

LAYERSKIP_DATA=/path/to/data python examples/checkpoint/prepare.py runs/mixture --rows 20000

writes into the folder: `train.jsonl` (shuffled; rows with prompt and completion, messages, or text),
`test-topv2.jsonl`, `test-debian.jsonl`, `test-scitldr.jsonl`, `test-python.jsonl` (prompt and reference)
and `mixture.json` (what was taken from where, its licence, and the files' sha256).

The shares are the table below, or those of `--shares topv2=60,debian=40`; where rows come from is in
mixture_sources.py, library_functions.py and own_answers.py. The same seed and data give the same files.
No row to train on begins like one that is held back.
"""

import argparse
import hashlib
import json
import platform
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import library_functions
import mixture_sources
import own_answers
from mixture_sources import Rows, Source, opening, running_text

# Percent of the rows.
SHARES: Mapping[str, float] = {
    "topv2": 45,
    "debian": 17,
    "scitldr": 4,
    "python": 15,
    "mbpp": 0.5,
    "gsm8k": 1.5,
    "wikitext2": 5,
    "own_answers": 12,
}
SOURCES: Mapping[str, Source] = {
    **mixture_sources.SOURCES,
    **library_functions.SOURCES,
    "own_answers": own_answers.SOURCE,
}
TIMES = 2  # that a row may stand in the mixture, where a source has too few
HELD_OUT_ROWS = 1000  # of a source at most


def main() -> None:
    """Read the command line and prepare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the files, new or empty")
    parser.add_argument("--data", help="folder of the data sets (default: $LAYERSKIP_DATA)")
    parser.add_argument("--rows", type=int, default=20000, help="rows to train on, all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shares", help="source=percent,... in place of the table's; 100 in all")
    options = parser.parse_args()
    try:
        shares = SHARES if options.shares is None else read_shares(options.shares)
        summary = prepare(options.output, options.rows, options.seed, options.data, shares)
    except ValueError as error:
        sys.exit(f"prepare.py: {error}")
    print(json.dumps(summary, indent=2))


def read_shares(text: str) -> dict[str, float]:
    """`topv2=60,debian=40` as a table.

    Raises:
        ValueError: no such source, or no number.
    """
    shares = {}
    for part in text.split(","):
        name, _, percent = part.strip().partition("=")
        if name not in SOURCES:
            raise ValueError(f"no source is called {name!r}; there are {', '.join(SOURCES)}")
        try:
            shares[name] = float(percent)
        except ValueError:
            raise ValueError(f"{part!r} has no percentage: write {name}=NUMBER") from None
    return shares


def prepare(
    output: Path,
    rows: int,
    seed: int = 0,
    data: str | None = None,
    shares: Mapping[str, float] = SHARES,
) -> dict[str, Any]:
    """Write the mixture into a folder.

    Args:
        output: the folder.
        rows: how many to train on, all sources together.
        seed: of the draw and the order.
        data: folder of the data sets; None takes that of $LAYERSKIP_DATA.
        shares: source -> percent of the rows.

    Returns:
        What stands in `mixture.json`.

    Raises:
        ValueError: a data set is not to be had, the shares are not those of a whole, or the folder
            has other files.
    """
    if not abs(sum(shares.values()) - 100) < 1e-6:
        raise ValueError(f"the shares come to {sum(shares.values())} percent, not 100")
    if min(shares.values()) <= 0:
        raise ValueError("a share is not above 0: leave the source out instead")
    if rows < 1:
        raise ValueError(f"rows is {rows}; at least 1 is needed")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; name a new folder")
    mixed: Rows = []
    sources: dict[str, Any] = {}
    files: dict[str, Rows] = {}
    for name, share in shares.items():
        found, held_out = apart(*SOURCES[name].read(data))
        chance = random.Random(f"{seed} {name}")  # other shares leave this source's order alone
        taken = take(found, round(rows * share / 100), chance)
        if SOURCES[name].running:
            taken[1::2] = map(running_text, taken[1::2])
        mixed += [{"source": name, **row} for row in taken]
        if held_out:
            files[f"test-{name}.jsonl"] = chance.sample(held_out, len(held_out))[:HELD_OUT_ROWS]
        sources[name] = {
            "share": share,
            "rows": len(taken),
            "wanted": round(rows * share / 100),
            "available": len(found),
            "twice": max(len(taken) - len(found), 0),
            "data": SOURCES[name].data,
            "licence": SOURCES[name].licence,
        }
    random.Random(seed).shuffle(mixed)
    output.mkdir(parents=True, exist_ok=True)
    summary = {
        "seed": seed,
        "rows": len(mixed),
        "python": platform.python_version(),  # whose standard library it is
        "sources": sources,
        "files": {
            name: write(output / name, rows)
            for name, rows in {"train.jsonl": mixed, **files}.items()
        },
    }
    (output / "mixture.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def apart(found: Rows, held_out: Rows) -> tuple[Rows, Rows]:
    """Leave rows out that begin like one that is held back."""
    openings = {opening(row) for row in held_out}
    return [row for row in found if opening(row) not in openings], held_out


def take(found: Rows, wanted: int, chance: random.Random) -> Rows:
    """Draw rows: each once, then again up to `TIMES`; fewer than wanted where that is all there is."""
    return (TIMES * chance.sample(found, len(found)))[:wanted]


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write rows as JSON lines; their number and the file's sha256."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(text)
    return {"rows": len(rows), "sha256": hashlib.sha256(text).hexdigest()}


if __name__ == "__main__":
    main()
