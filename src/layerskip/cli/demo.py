"""`layerskip demo`: the main job, end to end, on the built-in model."""

import dataclasses
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from layerskip.bench.measure import Entry, Setting
from layerskip.bench.own import OwnSystem, run_of
from layerskip.bench.rows import name_of, row
from layerskip.cli import options, show
from layerskip.decoding import Generation, LayerSkipModel
from layerskip.model.source import DEFAULT_MODEL
from layerskip.tuning.prompts import PROMPTS as TUNING_PROMPTS

PROMPTS = TUNING_PROMPTS[:4]
EXIT_LAYER, DRAFT_TOKENS = 25, 2
SETTINGS = (
    Setting(mode="plain"),
    Setting(mode="early-exit", exit_layer=EXIT_LAYER),
    Setting(mode="self-speculative", exit_layer=EXIT_LAYER, draft_tokens=DRAFT_TOKENS),
)
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
    model = options.load_model({**flags, "threads": threads, "compile": None})
    console = Console(highlight=False, quiet=as_json)
    system = OwnSystem(model, SETTINGS)
    for setting in SETTINGS:  # warm-up: the first passes allocate and choose kernels
        system.answer(setting, model.tokenize(_chat(PROMPTS[0])), 8)
    entries = [Entry(system, setting, []) for setting in SETTINGS]
    for prompt in PROMPTS:
        console.rule("prompt", align="left")
        console.print(prompt, style="bold", markup=False)
        for entry in entries:
            console.print(f"\n[dim]{name_of(dataclasses.asdict(entry.setting))}[/dim]")
            made = _show(model, prompt, max_new_tokens, entry.setting, quiet=as_json)
            entry.runs.append([run_of(made, model.decoder)])
    rows = [{**row(entry, plain=entries[0].runs), "prompts": len(PROMPTS)} for entry in entries]
    console.rule()
    console.print(_table(rows, model))
    console.print(HONEST_WORD)
    options.deliver({"model": DEFAULT_MODEL, "rows": rows}, as_json=as_json, output=output)


def _chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def _show(
    model: LayerSkipModel, prompt: str, max_new_tokens: int, setting: Setting, quiet: bool
) -> Generation:
    answer = model.answer(
        _chat(prompt),
        mode=setting.mode,
        exit_layer=setting.exit_layer,
        draft_tokens=setting.draft_tokens,
        max_new_tokens=max_new_tokens,
    )
    if not quiet:
        show.show_pieces(answer, show_draft=False)
    return answer.complete()


def _table(rows: list[dict[str, Any]], model: LayerSkipModel) -> Table:
    dtype = str(model.decoder.dtype).removeprefix("torch.")
    table = Table(title=f"{DEFAULT_MODEL}, {dtype}, {rows[0]['prompts']} prompts, greedy")
    for heading in ("mode", "tokens/s", "speedup", "acceptance", "identical to plain"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for figures in rows:
        rate = figures["acceptance_rate"]
        table.add_row(
            name_of(figures),
            f"{figures['tokens_per_s']:.1f}",
            f"{figures['speedup']:.2f}x",
            "" if rate is None else f"{rate:.0%}",
            f"{figures['identical_to_plain'] * figures['prompts']:.0f} of {figures['prompts']}",
        )
    return table
