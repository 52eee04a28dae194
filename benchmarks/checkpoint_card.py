"""The model card of a checkpoint, from what benchmarks/checkpoint.py measured.

    python benchmarks/checkpoint_card.py card.json --name smollm2-135m-layerskip > MODEL_CARD.md

Data and licences come from the mixture's record, settings and budget from that of training. Nothing is
said of what has no figure.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layerskip.training import TrainConfig

BASE_LICENCES = {"smollm2-135m": "SmolLM2-135M-Instruct, Apache-2.0"}
PLACES = ("output", "resume", "device")  # settings that say nothing about the result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, help="file of benchmarks/checkpoint.py")
    parser.add_argument("--name", help="of the model (default: the checkpoint's folder)")
    parser.add_argument("--trained-on", help="hardware of the training run, in words")
    options = parser.parse_args()
    measured = json.loads(options.measured.read_text(encoding="utf-8"))
    print(card(measured, options.name, options.trained_on), end="")


def card(measured: dict[str, Any], name: str | None = None, trained_on: str | None = None) -> str:
    """The card as Markdown.

    Args:
        measured: what benchmarks/checkpoint.py wrote.
        name: of the model.
        trained_on: hardware of the training run; its record does not have it.
    """
    checkpoint = measured["checkpoint"]
    parts = [
        [f"# {name or Path(checkpoint['name']).name}", "", *introduction(checkpoint)],
        data(mixtures) if (mixtures := mixtures_of(measured)) else [],
        training(measured, trained_on) if checkpoint["training"] else [],
        quality(measured),
        exits(measured),
        limits(measured),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def introduction(checkpoint: dict[str, Any]) -> Iterator[str]:
    runs = runs_of(checkpoint)
    base = runs[0]["settings"]["model"] if runs else None
    made = f"Made from {BASE_LICENCES.get(base, base)}, by" if base else "A checkpoint made by"
    yield (
        f"{made} training with layer dropout and early exit loss"
        " ([LayerSkip](https://arxiv.org/abs/2404.16710)), so that its first layers draft what all"
        f" {checkpoint['layers']} layers verify. It is an ordinary transformers checkpoint."
    )
    if checkpoint["exit_layer"]:
        yield ""
        yield (
            f"`generation_config.json` names exit {checkpoint['exit_layer']}: so many layers run"
            " before a draft."
        )


def mixtures_of(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the mixture of each run, else the mixture of the measurement."""
    known = [run.get("mixture") for run in runs_of(measured["checkpoint"])]
    return [mixture for mixture in known if mixture] or [*filter(None, [measured["mixture"]])]


def data(mixtures: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Data and licences"
    yield ""
    sources = {name: source for one in mixtures for name, source in one["sources"].items()}
    rows = [
        [source["data"], *(rows_of(name, one) for one in mixtures), source["licence"]]
        for name, source in sources.items()
    ]
    runs = [f"rows, run {n}" for n in range(1, len(mixtures) + 1)]
    yield from table(["trained on", *(runs if len(runs) > 1 else ["rows"]), "licence"], rows)
    yield ""
    for mixture in mixtures:
        yield (
            f"{mixture['rows']:,} rows were drawn with seed {mixture['seed']}"
            f" (`train.jsonl`, sha256 {mixture['files']['train.jsonl']['sha256']})."
        )
        for source in mixture["sources"].values():
            if source["twice"]:
                yield f"{source['twice']:,} rows stand in it twice: {source['data']}."


def rows_of(name: str, mixture: dict[str, Any]) -> str:
    source = mixture["sources"].get(name)
    return f"{source['rows']:,}" if source else ""


def runs_of(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that made a checkpoint, the first one first; [] where there is no record of them."""
    runs = []
    run = checkpoint["training"]
    while run:
        runs.append(run)
        run = run.get("before")
    return runs[::-1]


def training(measured: dict[str, Any], trained_on: str | None) -> Iterator[str]:
    runs = runs_of(measured["checkpoint"])
    yield "## Training"
    for number, run in enumerate(runs, 1):
        again = f", run {number} of {len(runs)}" if len(runs) > 1 else ""
        yield ""
        yield f"`layerskip train` with these settings{again}; all others are the defaults:"
        yield ""
        yield "```yaml"
        yield from (
            f"{key}: {json.dumps(value)}" for key, value in changed(run["settings"]).items()
        )
        yield "```"
        yield ""
        yield from budget(run)
    if trained_on:
        yield f"- hardware: {trained_on}"


def budget(trained: dict[str, Any]) -> Iterator[str]:
    settings = trained["settings"]
    steps, batch = trained["step"], settings["batch_size"] * settings["accumulation"]
    yield f"- budget: {steps:,} steps of {batch} rows on each device"
    if "train_runtime" in trained:
        since = " since it was last resumed" if settings["resume"] else ""
        yield f"- time{since}: {trained['train_runtime'] / 60:.0f} minutes"
    if "peak_memory_bytes" in trained:
        yield f"- peak memory: {trained['peak_memory_bytes'] / 2**30:.1f} GiB"
    yield f"- seed: {settings['seed']}"
    if "average" in trained:
        share, base = trained["average"]["share"], trained["average"]["base"]
        yield f"- afterwards: {share:.0%} of what had changed since {base} was kept"


def changed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not the regime's defaults."""
    needed = {name: settings[name] for name in ("model", "data", "output", "regime")}
    defaults = json.loads(json.dumps(TrainConfig.from_mapping(needed).as_flat_dict()))
    found = {k: v for k, v in settings.items() if k not in defaults or defaults[k] != v}
    return {k: v for k, v in (needed | found).items() if k not in PLACES}


def quality(measured: dict[str, Any]) -> Iterator[str]:
    machine, control = measured["environment"], measured.get("control")
    yield "## The whole model's answers"
    yield ""
    yield (
        f"Rows that were held back, greedy, {machine['dtype']}; measured with `{machine['command']}`"
        f" (commit {machine['commit']}, {machine['date']}, {machine['cpu']},"
        f" {machine['threads']} threads)."
    )
    if control:
        yield f"Control: `{Path(control['name']).name}`{how_it_differs(measured)}."
    yield ""
    both = [measured["checkpoint"], *([control] if control else [])]
    rows = [
        [
            name,
            f"{task['samples']:,}",
            metric,
            *(f"{m['tasks'][name]['quality'][metric]:.1%}" for m in both),
        ]
        for name, task in both[0]["tasks"].items()
        for metric in task["quality"]
    ]
    text = measured["text"]
    word = [f"{m['perplexity']['word_perplexity']:.2f}" for m in both]
    rows.append([text["name"], f"{text['words']:,} words", "word perplexity", *word])
    yield from table(["task", "rows", "", "this model", *(["control"] if control else [])], rows)


def how_it_differs(measured: dict[str, Any]) -> str:
    """The control's settings that are other than the checkpoint's, where both are known."""
    runs = [measured[which]["training"] for which in ("checkpoint", "control")]
    if not all(runs):
        return ""
    ours, theirs = (run["settings"] for run in runs)
    others = [
        f"`{name}: {json.dumps(value)}`"
        for name, value in theirs.items()
        if name not in PLACES and ours.get(name) != value
    ]
    return f", trained alike but for {', '.join(others)}" if others else ", trained alike"


def exits(measured: dict[str, Any]) -> Iterator[str]:
    yield "## Drafts of each exit"
    yield ""
    yield (
        "Agreement: how often exit E's top token is the last layer's, along the whole model's own"
        f" answers. Acceptance: of drafts of {measured['draft_tokens']} tokens; a round gives so many"
        " tokens, the model's own one included."
    )
    yield ""
    rows = [
        [
            name,
            str(row["exit_layer"]),
            f"{row['agreement']:.1%}",
            f"{row['acceptance_rate']:.1%}",
            f"{row['mean_accepted_length']:.2f}",
        ]
        for name, task in measured["checkpoint"]["tasks"].items()
        for row in task.get("exits", ())
    ]
    yield from table(["task", "E", "agreement", "acceptance", "tokens a round"], rows)


def limits(measured: dict[str, Any]) -> Iterator[str]:
    tasks = measured["checkpoint"]["tasks"]
    yield "## Limits"
    yield ""
    yield (
        f"- Measured were {', '.join(tasks)} and the perplexity above, nothing else: other tasks and"
        " languages, conversations and long prompts may have lost by this training."
    )
    found = [(row, name) for name, task in tasks.items() for row in task.get("exits", ())]
    if found:
        best, where = max(found, key=lambda pair: pair[0]["agreement"])
        yield (
            "- An early exit alone gives other answers than the whole model: even the best one above"
            f" (exit {best['exit_layer']}, {where}) differs at {1 - best['agreement']:.1%} of the"
            " tokens. Self-speculative decoding gives the whole model's."
        )
    if measured["environment"]["dtype"] != "float32":
        yield f"- The figures are those of {measured['environment']['dtype']} with 16-bit weights."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(line)} |"


if __name__ == "__main__":
    main()
