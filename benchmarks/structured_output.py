"""Answers that follow a JSON schema: plain, and drafted with and without the tokens the grammar forces.

The task is extraction: two examples, a held-out message, and one line of JSON with nine fields. The
systems are interleaved on each prompt.
"""

import argparse
import collections
import json
import statistics
from typing import Any

from common import deliver, environment_of, parse

from layerskip import Generation, LayerSkipModel
from layerskip.data.extraction import FIELDS, extraction_rows

TEXT = {"anyOf": [{"type": "string", "maxLength": 40}, {"type": "null"}]}
PROPERTIES: dict[str, Any] = dict.fromkeys(FIELDS, TEXT) | {
    "kind": {"enum": ["order", "appointment", "contact", "expense"]},
    "quantity": {"type": ["integer", "null"], "minimum": 0, "maximum": 999},
}
SCHEMA = {
    "type": "object",
    "properties": PROPERTIES,
    "required": list(FIELDS),
    "additionalProperties": False,
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "auto without grammar drafts": {"mode": "auto", "draft_from": "n-gram"},
    "auto": {"mode": "auto"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--samples", type=int, default=12)
    options = parse(parser)
    model = LayerSkipModel.from_pretrained(options.model, dtype="bfloat16")
    prompts = prompts_of(options.samples + 1)
    runs: dict[str, list[Generation]] = {name: [] for name in SYSTEMS}
    for i, prompt in enumerate(prompts):  # the first is the warm-up
        for name, system in SYSTEMS.items():
            answer = model.generate(prompt, json_schema=SCHEMA, max_new_tokens=300, **system)
            if i:
                json.loads(answer.text)
                runs[name].append(answer)
    results = {name: summary(runs[name], runs["plain"]) for name in SYSTEMS}
    here = environment_of("benchmarks/structured_output.py", model)
    deliver({"environment": here, "schema": SCHEMA, "results": results}, options.output)


def prompts_of(n: int) -> list[str]:
    """Return messages behind two examples."""
    examples = "".join(
        f"Message: {row['prompt']}JSON: {json.dumps(json.loads(row['completion']))}\n\n"
        for row in extraction_rows(2)
    )
    rows = extraction_rows(n, held_out=True)
    return [f"{examples}Message: {row['prompt']}JSON:" for row in rows]


def summary(answers: list[Generation], plain: list[Generation]) -> dict[str, Any]:
    """Return speed and drafting of a system's answers."""
    pairs = list(zip(answers, plain, strict=True))
    drafted, accepted = collections.Counter[str](), collections.Counter[str]()
    for answer in answers:
        for step in answer.steps:
            drafted.update(step.sources[: step.drafted])
            accepted.update(step.sources[: step.accepted])
    tokens = sum(answer.new_tokens for answer in answers)
    return {
        "answers": len(answers),
        "tokens": tokens,
        "passes": sum(len(answer.steps) for answer in answers),
        "tokens_per_s": round(
            sum(a.new_tokens - 1 for a in answers) / sum(a.decode_s for a in answers), 1
        ),
        "speedup_over_plain": round(
            statistics.median(p.decode_s / a.decode_s for a, p in pairs), 2
        ),
        "same_as_plain": sum(a.token_ids == p.token_ids for a, p in pairs),
        "drafted": drafted,
        "accepted": accepted,
    }


if __name__ == "__main__":
    main()
