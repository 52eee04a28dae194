"""How soon each turn of a conversation begins: what its turns share computed once, and computed anew.

    python benchmarks/conversation.py --output benchmarks/results/conversation.json

A long text is asked about, then "And what else?" again and again. Both ways take turns; their answers
are those of plain decoding, and have to be the same.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from engine import deliver, environment_of, parsed, run

from layerskip import LayerSkipModel
from layerskip.decoding import Prefix

TEXT = Path(__file__).resolve().parents[1] / "LICENSE"
NEW_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parsed(parser)
    model = LayerSkipModel.from_pretrained(options.model)
    text = " ".join(TEXT.read_text(encoding="utf-8").split())
    first = {"role": "user", "content": f"Summarize this: {text}"}
    made = [
        {
            "anew": conversation(model, first, None, options.turns),
            "once": conversation(model, first, Prefix(), options.turns),
        }
        for _ in range(options.rounds)
    ]
    for one in made:
        assert one["anew"]["token_ids"] == one["once"]["token_ids"]
    deliver(
        {
            "model": options.model,
            "prompt_tokens": made[0]["anew"]["prompt_tokens"],
            "first_token_s": {
                name: [
                    statistics.median(of_turn)
                    for of_turn in zip(*(one[name]["ttft_s"] for one in made), strict=True)
                ]
                for name in ("anew", "once")
            },
            "environment": environment_of("benchmarks/conversation.py", model),
        },
        options.output,
    )


def conversation(
    model: LayerSkipModel, first: dict[str, str], prefix: Prefix | None, turns: int
) -> dict[str, list[Any]]:
    """Tokens of each turn's prompt and answer, and the seconds to the answer's first token."""
    messages = [first]
    found: dict[str, list[Any]] = {"prompt_tokens": [], "ttft_s": [], "token_ids": []}
    for _ in range(turns):
        answer = model.answer(
            messages, prefix=prefix, mode="plain", max_new_tokens=NEW_TOKENS
        ).complete()
        for name, values in found.items():
            values.append(getattr(answer, name))
        messages = [
            *messages,
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": "And what else?"},
        ]
    return found


if __name__ == "__main__":
    run(main)
