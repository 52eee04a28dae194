"""Reference pages from the code; `python docs/reference_pages.py` writes them.

They are cli.md, config.md and metrics.md of docs/reference, the help texts that the tests compare
(tests/cli/help), and the flags for shell completion.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from layerskip.adapt import AdaptConfig
from layerskip.bench.systems import BenchConfig
from layerskip.cli.completion import FLAGS_FILE, flags_table
from layerskip.cli.config_flags import ModelConfig, config_fields
from layerskip.cli.main import layerskip_command
from layerskip.decoding import DecodingConfig, Sampling
from layerskip.recipe import RecipeConfig
from layerskip.serve.config import ServeConfig
from layerskip.training import TrainConfig
from layerskip.tune import TuneConfig

_NOTE = "This page is generated: run `python docs/reference_pages.py` after a change of options."
_WIDTH = 80
# Class -> heading and introduction of its table.
_CONFIGS: dict[type[Any], tuple[str, str]] = {
    ModelConfig: (
        "Loading a model",
        "Flags of every command that loads a model, and arguments of"
        " [`LayerSkipModel.from_pretrained`](python.md).",
    ),
    DecodingConfig: (
        "Decoding",
        "Fields of `layerskip.decoding.DecodingConfig`, keywords of `LayerSkipModel.generate`, and flags"
        " of `generate`, `chat` and `serve`. An option without a default is taken from the checkpoint or"
        " from the [mode](../concepts/auto.md). `draft_text` is an alias of `datastore`. Sampling"
        " settings in `generation_config.json` are not used.",
    ),
    TrainConfig: (
        "Training",
        "Fields of `layerskip.training.TrainConfig`, keys of the YAML file, and flags of"
        " [`layerskip train`](../how-to/train.md).",
    ),
    RecipeConfig: (
        "Recipe",
        "Fields of `layerskip.recipe.RecipeConfig`, also keys and flags of `layerskip train`. The"
        " symbols are explained in [the recipe](../concepts/self-speculative-decoding.md#training).",
    ),
    AdaptConfig: (
        "Adapters",
        "Fields of `layerskip.adapt.AdaptConfig`, and flags of [`layerskip adapt`](../how-to/adapt.md).",
    ),
    TuneConfig: (
        "Tuning",
        "Fields of `layerskip.tune.TuneConfig`, and flags of [`layerskip tune`](../how-to/tune.md).",
    ),
    BenchConfig: (
        "Benchmarks",
        "Fields of `layerskip.bench.systems.BenchConfig`, and flags of"
        " [`layerskip bench`](../how-to/bench.md), besides those of sampling (see Decoding).",
    ),
    ServeConfig: (
        "Server",
        "Flags of [`layerskip serve`](../how-to/serve.md), besides those of loading and decoding, which"
        " are the defaults of requests.",
    ),
}


def help_texts() -> dict[str, str]:
    """Return the text of --help of every command, and of the program as "layerskip"."""
    root = click.Context(
        layerskip_command,
        info_name="layerskip",
        terminal_width=_WIDTH,
        **layerskip_command.context_settings,
    )
    texts = {"layerskip": layerskip_command.get_help(root)}
    for name, command in _commands().items():
        context = click.Context(command, root, info_name=name, terminal_width=_WIDTH)
        texts[name] = command.get_help(context)
    return {name: text + "\n" for name, text in texts.items()}


def options_table(config: type[Any], without: frozenset[str] = frozenset()) -> str:
    """Return the Markdown table of the options of a configuration class."""
    rows = ["| key | flag | default | meaning |", "|---|---|---|---|"]
    for name, (field, kind, option) in config_fields(config).items():
        if name in without:
            continue
        flags = option.flags or (_flag(name),)
        if kind is bool and field.default is not False:
            flags = (*flags, f"--no-{flags[0].removeprefix('--')}")
        meaning = option.help
        choices = get_args(kind) if get_origin(kind) is Literal else option.choices
        if choices is not None:
            meaning += " One of " + ", ".join(f"`{choice}`" for choice in choices) + "."
        shown = ", ".join(f"`{flag}`" for flag in flags) if option.on_command_line else ""
        rows.append(_row(f"`{name}`", shown, _default(field.default), meaning))
    return "\n".join(rows)


def presets_table() -> str:
    """Return the Markdown table of the recipe's presets, one row for each regime."""
    names = ("p_max", "e_scale", "curriculum", "rotation", "dropout_over_steps")
    rows = [_row("regime", *(f"`{name}`" for name in (*names, "learning_rate")))]
    rows.append("|---" * (len(names) + 2) + "|")
    for regime in get_args(get_type_hints(TrainConfig)["regime"]):
        config = TrainConfig(model="m", data="d", output="o", regime=regime)
        recipe = dataclasses.asdict(config.effective_recipe)
        if recipe["curriculum"] != "rotational":
            recipe["rotation"] = ""
        values = [str(recipe[name]) for name in names]
        rows.append(_row(f"`{regime}`", *values, f"{config.effective_learning_rate:g}"))
    return "\n".join(rows)


def config_page() -> str:
    """Return the Markdown page of all configuration classes."""
    parts = [
        "# Configuration",
        "An option has one name: it is the field of a configuration class, the YAML key, the flag (with"
        " `--` and dashes), and the key in [JSON results](results.md). Values out of range and"
        " contradictions raise `ValueError`.",
        _NOTE,
    ]
    shown_elsewhere = {
        TrainConfig: frozenset(config_fields(RecipeConfig)) - {"seed"},
        RecipeConfig: frozenset({"seed"}),
        BenchConfig: frozenset(config_fields(Sampling)),
    }
    for config, (heading, text) in _CONFIGS.items():
        parts += [
            f"## {heading}",
            text,
            options_table(config, shown_elsewhere.get(config, frozenset())),
        ]
        if config is RecipeConfig:
            parts += [
                "`regime` sets these values, which are the paper's; other options override them.",
                presets_table(),
            ]
    return "\n\n".join(parts) + "\n"


def metrics_page() -> str:
    """Return the Markdown page of the server's metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    from layerskip.serve.engine import EngineStats
    from layerskip.serve.metrics import Metrics

    empty: dict[str, Any] = {
        field.name: {} if field.name.startswith("num_") else 1
        for field in dataclasses.fields(EngineStats)
    }
    stats = EngineStats(**empty | {"num_requests_running": 0, "num_requests_waiting": 0})
    text = Metrics("model", lambda: stats).render().decode()
    rows = [_row("metric", "type", "meaning"), "|---|---|---|"]
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            name = family.name + ("_total" if family.type == "counter" else "")
            rows.append(_row(f"`{name}`", family.type, family.documentation))
    parts = [
        "# Metrics",
        "`GET /metrics` of [`layerskip serve`](../how-to/serve.md), for Prometheus. Names are those of"
        " vLLM with the prefix `layerskip:`. Every metric has the label `model_name`;"
        " `request_success_total` also has `finished_reason`, the `spec_decode_*` counters `source` (the"
        " drafter), and `spec_decode_num_accepted_tokens_per_pos_total` `position`. Latencies are in"
        " seconds."
        " [grafana.json](../../examples/serve/grafana.json) is a dashboard.",
        _NOTE,
        "\n".join(rows),
    ]
    return "\n\n".join(parts) + "\n"


def cli_page() -> str:
    """Return the Markdown page of all commands and their flags."""
    parts = [
        "# Command line",
        "Every command, with its flags. `layerskip COMMAND --help` shows them with examples. The exit"
        " status is 0 on success, 2 for a usage error, 1 for a failure, 130 after Ctrl-C, 143 after"
        " SIGTERM, and 141 where the reader of stdout has left.",
        _NOTE,
    ]
    for name, command in _commands().items():
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        usage = " ".join([name, *(p.make_metavar(click.Context(command)) for p in arguments)])
        summary = (command.help or "").split("\n\n")[0].replace("\n", " ")
        parts += [f"## `layerskip {usage}`", summary, _flags_table(command)]
    return "\n\n".join(parts) + "\n"


def pages(root: Path) -> dict[Path, str]:
    """Return the generated files of a checkout: path -> text."""
    reference = root / "docs" / "reference"
    result = {
        reference / "cli.md": cli_page(),
        reference / "config.md": config_page(),
        reference / "metrics.md": metrics_page(),
    }
    result[root / "src" / "layerskip" / "cli" / FLAGS_FILE.name] = flags_table(_commands().values())
    folder = root / "tests" / "cli" / "help"
    return result | {folder / f"{name}.txt": text for name, text in help_texts().items()}


def main(root: Path) -> None:
    """Write the generated files of a checkout."""
    for path, text in pages(root).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _commands() -> dict[str, click.Command]:
    context = click.Context(layerskip_command)
    commands = {
        name: layerskip_command.get_command(context, name)
        for name in layerskip_command.list_commands(context)
    }
    return {name: command for name, command in commands.items() if command is not None}


def _flags_table(command: click.Command) -> str:
    rows = ["| flag | value | meaning |", "|---|---|---|"]
    context = click.Context(command)
    for parameter in command.params:
        if not isinstance(parameter, click.Option):
            continue
        flags = ", ".join(f"`{flag}`" for flag in (*parameter.opts, *parameter.secondary_opts))
        value = "" if parameter.is_flag else f"`{parameter.make_metavar(context)}`"
        text = parameter.help or ""
        if parameter.show_default and parameter.default is not None and "[default" not in text:
            text += f"  [default: {parameter.get_default(context)}]"
        rows.append(_row(flags, value, text))
    return "\n".join(rows)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(value: Any) -> str:
    """Return a cell with a field's default, as YAML has it; empty where there is none."""
    if value in (None, (), "", dataclasses.MISSING):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{', '.join(value) if isinstance(value, tuple) else value}`"


def _row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    main(Path(__file__).parents[1])
