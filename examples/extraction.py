"""Write rows of a narrow task: a short message, and one line of JSON with its fields.

    python examples/extraction.py rows.jsonl
    python examples/extraction.py held-out.jsonl --rows 200 --held-out

Then train with any of the three, and look at quality and speed on messages of other words:

    layerskip train examples/extraction.yaml --data rows.jsonl --output runs/extraction
    layerskip bench --model runs/extraction --task held-out.jsonl

    layerskip export --model smollm2-135m --to hf my-model
    python examples/plain_trainer.py --model my-model --data rows.jsonl --output runs/plain
    python examples/trl_sft.py --model my-model --data rows.jsonl --output runs/trl

For a task of your own replace the rows: each is an object with the texts `prompt` and `completion`.
"""

import argparse
import json
from pathlib import Path

from layerskip.data.extraction import extraction_rows


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="use only main phrases, names, items and places that are in no other row",
    )
    options = parser.parse_args()
    rows = extraction_rows(options.rows, seed=options.seed, held_out=options.held_out)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    options.file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
