"""Agreement of the pages with the code."""

import re
import shlex
import types
from dataclasses import fields
from pathlib import Path
from unittest import mock

import click
import gguf
import reference_pages

from layerskip import Generation
from layerskip.bench.bench import Row
from layerskip.bench.measure import Entry, Run, Setting
from layerskip.bench.rows import row
from layerskip.cli import layerskip_command
from layerskip.decoding import DecodingConfig, Step
from layerskip.lens import Report
from layerskip.model.block_formats import FORMATS
from layerskip.model.families import FAMILIES
from layerskip.tune import Choice, Tuning

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = [DOCS / "reference" / "cli.md", DOCS / "reference" / "config.md"]


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
        given = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert given <= flags, f"layerskip {name}: {given - flags}"


# Of llama.cpp and of the scripts in benchmarks/.
FLAGS_OF_OTHERS = {
    "--shares",
    "--spec-type",
    "--spec-draft-n-max",
    "--draft-max",
    "--trained-on",
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


def test_generated_pages_are_up_to_date():
    """After a change of options: python docs/reference_pages.py."""
    for path, text in reference_pages.pages(ROOT).items():
        assert path.read_text() == text, path


def first_column(page, heading):
    """The names in code in the first column of the tables under a heading."""
    section = re.split(r"^## ", (DOCS / "reference" / page).read_text(), flags=re.MULTILINE)
    (text,) = (part for part in section if part.splitlines()[0] == heading)
    cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def row_of_a_baseline():
    config = DecodingConfig(mode="self-speculative", exit_layer=2, draft_tokens=4)
    run = Run(steps=(Step((0,)), Step((1,))), text="", ttft_s=1.0, decode_s=1.0)
    runs = [[run], [run]]
    entry = Entry(types.SimpleNamespace(name="llama.cpp"), Setting(config=config), runs)
    figures = row(entry, plain=runs, layerskip_plain=runs, categories=["a", "b"])
    failed = row(Entry(entry.system, entry.setting, [], "it failed"), plain=None)
    return {*figures, *failed} - {field.name for field in fields(DecodingConfig)}


def tuning():
    choice = Choice(
        mode="plain",
        exit_layer=None,
        draft_tokens=None,
        tokens_per_s=1.0,
        speedup=1.0,
        speedup_interval=[1.0, 1.0],
        reason="",
    )
    values = {field.name: mock.MagicMock() for field in fields(Tuning)}
    return Tuning(**values | {"choice": choice, "predictions": []}).to_dict()


def test_every_field_of_a_result_is_explained():
    of_command = {  # and those that the command adds
        "generate": {*Generation.to_dict(mock.MagicMock())},
        "bench": row_of_a_baseline(),
        "eval": {*Row(DecodingConfig(), "auto").to_dict()},
        "tune": {*tuning(), "model", "data", "written_to", "pictures"},
        "lens": {*Report.to_dict(mock.MagicMock())},
    }
    for command, names in of_command.items():
        assert {*first_column("results.md", f"`layerskip {command}`")} == names, command


def test_tables_of_models_are_complete():
    assert first_column("models.md", "Architectures") == [*FAMILIES]
    text = (DOCS / "reference" / "models.md").read_text()
    kept = re.findall(r"^\| ([^|]*) \| kept \|", text, re.MULTILINE)
    names = [name for cell in kept for name in cell.split(", ")]
    assert {gguf.GGMLQuantizationType[name] for name in names} == {*FORMATS}


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


def test_pages_are_short():
    for page in {*DOCS.rglob("*.md")}.difference(GENERATED):
        written = re.sub(r"<!--table:.*?<!--end-->", "", page.read_text(), flags=re.DOTALL)
        assert len(written.split()) <= 1200, page


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 700
