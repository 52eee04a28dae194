"""What weights in 8 and 4 bits cost: mean negative log-likelihood on WikiText-2.

The same tokens for each, in windows of 1,024; `relative_change` is that of the nats a token, against
16-bit weights of the same dtype in the same run:

    LAYERSKIP_DATA=data python benchmarks/weights.py --output benchmarks/results/weights.json
"""

import argparse
import json
import math
from typing import Any

from engine import deliver, environment_of, parsed, run

from layerskip import LayerSkipModel
from layerskip.bench.perplexity import perplexity
from layerskip.data.readers import read_text
from layerskip.model.quantize import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--words", type=int, default=4000)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    options = parsed(parser)
    text = read_text("wikitext2", options.words)
    rows: list[dict[str, Any]] = []
    for weights in WEIGHTS:
        model = LayerSkipModel.from_pretrained(options.model, dtype=options.dtype, weights=weights)
        n_layers = len(model.decoder.layers)
        found = perplexity(model, text, [n_layers], window=1024, stride=1024, batch_size=1)
        nats = math.log(found[n_layers]["token_perplexity"].value)
        first = rows[0]["nats_per_token"] if rows else nats
        rows.append(
            {
                "weights": weights,
                "nats_per_token": nats,
                "relative_change": nats / first - 1,
                "weight_bytes": model.decoder.weight_bytes,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    tokens = len(model.tokenizer.encode(text, add_special_tokens=False, verbose=False))
    result = {
        "environment": environment_of("benchmarks/weights.py", model, ",".join(WEIGHTS)),
        "model": options.model,
        "task": "wikitext2",
        "tokens": tokens,
        "rows": rows,
    }
    deliver(result, options.output)


if __name__ == "__main__":
    run(main)
