"""What a difference keeps of a trained checkpoint in 1, 2 and 4 bits: how well exits predict a text.

Each kind is written with `to_difference`, merged with the base again, and reads the same tokens as the
checkpoint itself and the base, at the checkpoint's exit layer and at the last one:

    LAYERSKIP_DATA=data python benchmarks/difference_bits.py runs/trained \\
        --output benchmarks/results/difference-bits.json
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from engine import deliver, environment, parsed, run

from layerskip import LayerSkipModel, merge
from layerskip.bench.perplexity import perplexity, read_text
from layerskip.export import open_source, to_difference

# Bits, and those of what drafts where they are others.
KINDS: tuple[tuple[int, int | None], ...] = ((2, None), (1, None), (1, 4), (4, None))
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="folder of a checkpoint that names an exit layer")
    parser.add_argument("--base", default="smollm2-135m", help="what its training began with")
    parser.add_argument("--text", default="wikitext2", help="or a text file")
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parsed(parser)
    text = read_text(options.text, options.words)
    source = open_source(options.checkpoint)
    exit_layer = source.files.settings.exit_layer
    if exit_layer is None:
        parser.error(f"{options.checkpoint} names no exit layer")

    def read(model: str | Path) -> dict[str, Any]:
        """Nats a token and the share of tokens that come first, of both exits."""
        loaded = LayerSkipModel.from_pretrained(model, dtype=options.dtype)
        exits = (exit_layer, len(loaded.decoder.layers))
        found = perplexity(loaded, text, exits, window=WINDOW, stride=WINDOW)
        return {
            f"exit_{e}": {
                "nats_per_token": math.log(figures["token_perplexity"].value),
                "token_accuracy": figures["token_accuracy"].value,
            }
            for e, figures in found.items()
        }

    rows: list[dict[str, Any]] = [
        {"what": "checkpoint", **read(options.checkpoint)},
        {"what": "base", **read(options.base)},
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, (bits, draft_bits) in enumerate(KINDS):
            file, merged = Path(folder, f"{number}.safetensors"), Path(folder, str(number))
            made = to_difference(source, file, base=options.base, bits=bits, draft_bits=draft_bits)
            merge(file, merged, base=options.base)
            kind = {"what": "difference", "bits": bits, "draft_bits": draft_bits}
            rows.append({**kind, "bytes": made.bytes, **read(merged)})
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "environment": environment("benchmarks/difference_bits.py", options.dtype),
        "checkpoint": options.checkpoint,
        "base": options.base,
        "text": {"name": options.text, "words": options.words},
        "exit_layer": exit_layer,
        "rows": rows,
    }
    deliver(result, options.output)


if __name__ == "__main__":
    run(main)
