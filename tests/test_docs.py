"""Agreement of the pages with the code."""

import inspect
import re
import shlex
from pathlib import Path
from typing import get_args, get_type_hints
from unittest import mock

import click

from layerskip import Generation, LayerSkipModel
from layerskip.cli import layerskip_command, reference
from layerskip.cli.config_flags import config_fields
from layerskip.decoding import DecodingConfig
from layerskip.training import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text):
    """The `layerskip ...` commands in a page's blocks of shell, as lists of words."""
    for language, block in re.findall(r"^```([a-z]*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if language not in ("", "sh", "bash"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|\| )(?:\S+=\S+ |\S+/)*layerskip (.*)", line)
            if found:
                yield shlex.split(found[1], comments=True)


def test_flags_in_the_pages_exist():
    context = click.Context(layerskip_command)
    found = [command for page in PAGES for command in commands(page.read_text())]
    assert len(found) > 50
    for name, *words in found:
        command = layerskip_command.get_command(context, name)
        assert command is not None, name
        flags = {"--help", "-h"}
        for parameter in command.params:
            flags |= {*parameter.opts, *parameter.secondary_opts}
        given = {word.split("=")[0] for word in words if word.startswith("-")}
        assert given <= flags, f"layerskip {name}: {given - flags}"


# Of llama.cpp and of the scripts in benchmarks/.
FLAGS_OF_OTHERS = {
    "--shares",
    "--spec-type",
    "--spec-draft-n-max",
    "--draft-max",
    "--trained-on",
    "--control",
}


def test_flags_in_sentences_and_tables_exist():
    context = click.Context(layerskip_command)
    flags = {"--help", *FLAGS_OF_OTHERS}
    for name in layerskip_command.list_commands(context):
        for parameter in layerskip_command.get_command(context, name).params:
            flags |= {*parameter.opts, *parameter.secondary_opts}
    for page in PAGES:
        text = without_code(page)
        spans = [s for s in re.findall(r"`([^`\n]+)`", text) if re.match(r"--|layerskip ", s)]
        named = {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
        assert named <= flags, (page.name, named - flags)


def without_code(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_every_setting_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "recipe.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(TrainConfig.settings())


def test_the_presets_are_those_of_the_table():
    text = (ROOT / "docs" / "recipe.md").read_text()
    table = text.split("| regime | for |")[1].split("\n\n")[0].splitlines()[2:]
    of_pages = {}
    for line in table:
        regime, _, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        of_pages[regime] = figures
    for regime, figures in of_pages.items():
        config = TrainConfig(model="m", data="d", output="o", regime=regime)
        recipe = config.effective_recipe
        rotation = f" {recipe.rotation}" if recipe.curriculum == "rotational" else ""
        over_steps = {"none": "1"}.get(recipe.dropout_over_steps, recipe.dropout_over_steps)
        assert figures[2:4] == [recipe.curriculum + rotation, over_steps]
        in_numbers = [float(figures[i]) for i in (0, 1, 4)]
        assert in_numbers == [recipe.p_max, recipe.e_scale, config.effective_learning_rate]
    assert [*of_pages] == [*get_args(get_type_hints(TrainConfig)["regime"])]


def test_every_option_and_field_of_an_answer_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    loading = inspect.signature(LayerSkipModel.from_pretrained).parameters
    expected = [
        *(name for name in loading if name != "name_or_path"),
        *config_fields(DecodingConfig),
        *Generation.to_dict(mock.MagicMock()),
    ]
    assert rows == expected


def test_generated_pages_are_up_to_date():
    """After a change of options: python -m layerskip.cli.reference."""
    for path, text in reference.pages(ROOT).items():
        assert path.read_text() == text, path


def test_links_between_files_lead_somewhere():
    for page in PAGES:
        for target, place in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text()):
            if "://" in target:
                continue
            file = page.parent / target if target else page
            assert file.exists(), (page.name, target)
            if place:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert place in map(anchor, headings), (page.name, f"{target}#{place}")


def anchor(heading):
    """Return the anchor of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_rows_of_a_table_have_the_cells_of_its_head():
    text = "\n\n".join(map(without_code, PAGES))
    for table in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table
        assert re.match(r"[|: -]+$", table.splitlines()[1]), table
