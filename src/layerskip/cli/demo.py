"""`layerskip demo`: the main job, end to end, on the built-in model."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from layerskip.cli import options, show
from layerskip.decoding import Generation, LayerSkipModel
from layerskip.model.source import DEFAULT_MODEL

PROMPTS = (
    "Name three rivers in Europe and say where each of them ends.",
    "Write a Python function that counts the vowels in a text.",
    "Explain in two sentences why the sky is blue.",
    "Summarize in one sentence: The library opens at nine. On Sundays it is closed. Books may be"
    " kept for three weeks, and longer if nobody else has asked for them.",
)
EXIT_LAYER, DRAFT_TOKENS = 25, 2
MODES: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    f"early exit, E={EXIT_LAYER}": {"mode": "early-exit", "exit_layer": EXIT_LAYER},
    f"self-speculative, E={EXIT_LAYER}, d={DRAFT_TOKENS}": {
        "mode": "self-speculative",
        "exit_layer": EXIT_LAYER,
        "draft_tokens": DRAFT_TOKENS,
    },
}
HONEST_WORD = (
    "This checkpoint was not trained with layer dropout and early exit loss, so its early layers"
    " rarely agree with the last one: an early exit alone writes poor text, and drafts are seldom"
    " accepted, which makes self-speculative decoding no faster here. What can be seen is that its"
    " answers are those of plain decoding (in 16 bits up to rounding, in float32 to the token). To"
    " teach early layers to answer, train with the recipe: layerskip train --help."
)


@click.command("demo")
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=64, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="As for generate."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads to use.")
@options.result_options
@options.debug_option
def command(
    max_new_tokens: int,
    dtype: str | None,
    threads: int | None,
    as_json: bool,
    output: Path | None,
) -> None:
    """Fetch SmolLM2-135M and decode real prompts in three ways, side by side.

    \b
    Examples:
      layerskip demo
      layerskip demo --max-new-tokens 128 --output demo.json
    """
    options.check_output(output)
    flags = {"model": DEFAULT_MODEL, "dtype": dtype, "weights": "16bit", "device": "cpu"}
    model = options.load_model({**flags, "threads": threads})
    console = Console(highlight=False, quiet=as_json)
    for mode in MODES.values():  # warm-up: the first passes allocate and choose kernels
        model.generate(_chat(PROMPTS[0]), max_new_tokens=8, **mode)
    answers: dict[str, list[Generation]] = {name: [] for name in MODES}
    for prompt in PROMPTS:
        console.rule("prompt", align="left")
        console.print(prompt, style="bold", markup=False)
        for name, mode in MODES.items():
            console.print(f"\n[dim]{name}[/dim]")
            answers[name].append(_show(model, prompt, max_new_tokens, mode, quiet=as_json))
    rows = [_row(name, generations, answers["plain"]) for name, generations in answers.items()]
    console.rule()
    console.print(_table(rows, model))
    console.print(HONEST_WORD)
    options.deliver({"model": DEFAULT_MODEL, "rows": rows}, as_json=as_json, output=output)


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _show(
    model: LayerSkipModel, prompt: str, max_new_tokens: int, mode: dict[str, Any], quiet: bool
) -> Generation:
    answer = model.answer(_chat(prompt), max_new_tokens=max_new_tokens, **mode)
    if not quiet:
        show.show_pieces(answer, show_draft=False)
    return answer.complete()


def _row(name: str, generations: list[Generation], plain: list[Generation]) -> dict[str, Any]:
    def speed(some: list[Generation]) -> float:
        return sum(g.new_tokens - 1 for g in some) / sum(g.decode_s for g in some)

    drafted = sum(g.drafted for g in generations)
    same = sum(g.token_ids == p.token_ids for g, p in zip(generations, plain, strict=True))
    return {
        "name": name,
        "mode": generations[0].mode,
        "exit_layer": generations[0].exit_layer,
        "draft_tokens": generations[0].draft_tokens,
        "tokens_per_s": speed(generations),
        "speedup": speed(generations) / speed(plain),
        "acceptance_rate": sum(g.accepted for g in generations) / drafted if drafted else None,
        "identical_to_plain": same / len(plain),
        "prompts": len(plain),
    }


def _table(rows: list[dict[str, Any]], model: LayerSkipModel) -> Table:
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    table = Table(title=f"{DEFAULT_MODEL}, {dtype}, {rows[0]['prompts']} prompts, greedy")
    for heading in ("mode", "tokens/s", "speedup", "acceptance", "identical to plain"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for row in rows:
        rate = row["acceptance_rate"]
        table.add_row(
            row["name"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['speedup']:.2f}x",
            "" if rate is None else f"{rate:.0%}",
            f"{row['identical_to_plain'] * row['prompts']:.0f} of {row['prompts']}",
        )
    return table
