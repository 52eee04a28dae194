"""`layerskip demo`: three scenes, plain and auto side by side."""

import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from layerskip import LayerSkipModel
from layerskip.bench.systems import settings_of
from layerskip.cli import demo, demo_view
from layerskip.cli.demo import SCENES
from layerskip.cli.demo_svg import Panel, animation
from layerskip.cli.demo_view import Column, Frame, Record
from layerskip.cli.output import escape_control_chars

SHORT = ("--max-new-tokens", 8)


@pytest.fixture(autouse=True)
def short_edit(monkeypatch):
    """The text to edit is longer than the tiny model's context."""
    commands, edit, question = SCENES
    edit = dataclasses.replace(edit, template="{text}")
    monkeypatch.setattr(demo, "SCENES", (commands, edit, question))


@pytest.fixture(scope="module")
def model(folder):
    return LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)


def test_lines_a_table_and_notes_without_a_terminal(run):
    status, out, err = run("demo", "--no-compile", *SHORT)
    assert (status, err) == (0, "")
    assert "\x1b" not in out  # no terminal, no live display
    for scene in SCENES:
        assert scene.title in out
        assert re.search(rf"{scene.name}: .*{scene.note}", out)
        for i, text in enumerate(scene.texts, 1):
            assert f"{scene.name}, {i} of {len(scene.texts)}" in out
            assert text in out
    assert out.count("[plain") == out.count("[auto") == sum(len(s.texts) for s in SCENES)
    assert "4 of 4" in out  # identical to plain
    assert "layerskip bench" in out


def test_one_document_with_the_rows_of_bench(run, folder, tmp_path):
    output = tmp_path / "demo.json"
    status, out, _ = run("demo", "--no-compile", "--json", "--output", output, *SHORT)
    assert status == 0
    document = json.loads(out)
    assert document == json.loads(output.read_text())
    assert list(document) == ["environment", "scenes", "elapsed_s"]
    assert document["elapsed_s"] > 0
    assert [(s["task"], s["samples"], s["model"]) for s in document["scenes"]] == [
        (scene.name, len(scene.texts), str(folder)) for scene in SCENES
    ]
    for scene in document["scenes"]:
        assert [row["mode"] for row in scene["rows"]] == ["plain", "auto"]
        assert [row["identical_to_plain"] for row in scene["rows"]] == [1.0, 1.0]  # float32
        assert scene["rows"][0]["speedup"] == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--minutes", 1), "--minutes and --folder belong to --train"),
        (("--folder", "x"), "--minutes and --folder belong to --train"),
        (("--picture", "no/such/folder.svg"), "the folder of --picture"),
        (("--train", "--picture", "demo.svg"), "--picture shows the scenes"),
        (("--max-new-tokens", 1), "1 is not in the range"),
        (("--train", "--minutes", 0), "0.0 is not in the range"),
    ],
)
def test_bad_flags_are_one_line(run, flags, message):
    status, out, err = run("demo", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_chat_scenes_ask_in_a_conversation():
    commands, edit, question = SCENES
    assert commands.prompt("Wake me") == "Wake me\n"
    (message,) = edit.prompt("Write it again.")
    assert message["content"].startswith(edit.prediction)
    assert message["content"].endswith("Write it again.")
    assert question.prompt("Why?") == [{"role": "user", "content": "Why?"}]


# --- the picture


def test_picture_is_drawn_from_the_run(run, tmp_path):
    file = tmp_path / "demo.svg"
    status, out, _ = run("demo", "--no-compile", "--picture", file, *SHORT)
    assert status == 0
    assert f"Drawn: {file}" in out
    picture = ElementTree.parse(file).getroot()
    assert picture.tag.endswith("svg")
    for scene in SCENES:
        assert scene.title in file.read_text()


def svg(*columns, title="Title"):
    record = Record("prompt", tuple(columns))
    return ElementTree.fromstring(animation([Panel(title, record), Panel("B", record)]))


def texts(root):
    return [e for e in root.iter() if e.tag.endswith("text")]


PLAIN = Column(
    "plain", [Frame(1.0, "one <two> ", "model"), Frame(2.0, "three", "model")], 1.0, True
)
AUTO = Column("auto", [Frame(1.0, "one ", "model"), Frame(1.0, "<two> three", "n-gram")], 2.0, True)


def test_pieces_appear_at_their_times_in_proportion():
    root = svg(PLAIN, AUTO)
    groups = [
        g
        for g in root.iter()
        if g.tag.endswith("}g") and any("three" in (t.text or "") for t in texts(g))
    ]
    starts = []
    for group in groups[1:3]:  # groups[0] is the whole first prompt
        times = group[0].get("keyTimes").split(";")
        starts.append(float(times[1]) * float(group[0].get("dur").rstrip("s")))
    assert starts == pytest.approx([6.0, 3.0], abs=0.01)  # the slower answer fills the time


def test_colours_are_those_of_origins_and_every_letter_is_there():
    root = svg(PLAIN, AUTO)
    drafted = [t.text for t in texts(root) if t.get("class") == "lookup"]
    assert drafted == ["<two> three"] * 2
    own = [t.text for t in texts(root) if t.get("textLength") and t.get("class") is None]
    assert own == ["one <two> ", "three", "one "] * 2


def test_long_answers_are_wrapped_within_the_card():
    text = "a word or two " * 30 + "\n\n" + "x" * 130
    column = Column("plain", [Frame(0.1 * i, c, "model") for i, c in enumerate(text)], 1.0, True)
    root = svg(column, column)
    width, height = (float(v) for v in root.get("viewBox").split()[2:])
    for element in texts(root):
        length = float(element.get("textLength") or 0)
        assert float(element.get("x")) + length <= width
        assert float(element.get("y")) <= height


def test_the_picture_has_no_script_and_both_colour_schemes():
    text = animation([Panel("Title", Record("p", (PLAIN, AUTO)))])
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert text.count('repeatCount="indefinite"') > 2


# --- the live display


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def terminal(screen):
    environment = {"TERM": "xterm"}
    return Console(
        file=screen, force_terminal=True, highlight=False, width=100, _environ=environment
    )


def compare(model, prompts, console, n=8):
    settings = settings_of(model, modes=demo_view.MODES)
    return demo_view.compare(
        model, "letters", prompts, prompts, settings, max_new_tokens=n, console=console
    )


def test_live_columns_fill_and_both_answers_stay(model, terminal, screen, monkeypatch):
    monkeypatch.setattr(demo_view, "REFRESH_S", -1.0)  # every token is drawn
    entries, records = compare(model, ["abc", "xyz"], terminal, 40)
    shown = screen.getvalue()
    assert [entry.setting.mode for entry in entries] == ["plain", "auto"]
    assert [len(entry.runs) for entry in entries] == [2, 2]  # the warm-up is no run
    assert "letters, 1 of 2" in shown
    assert "letters, 2 of 2" in shown
    assert "\x1b[?25l" in shown  # the cursor is hidden while columns fill
    assert shown.rstrip().endswith("\x1b[?25h")
    last = shown.rsplit("letters, 2 of 2")[-1]
    assert last.index(" plain ") < last.index(" auto ")
    tokens = sum(len(runs[0].token_ids) for entry in entries for runs in entry.runs)
    assert shown.count(" auto ") >= tokens > 8  # both columns are drawn for each
    assert last.count("tokens/s") > 2
    assert [record.prompt for record in records] == ["abc", "xyz"]


def test_a_record_has_the_time_of_every_piece(model):
    console = Console(file=io.StringIO())
    entries, (record,) = compare(model, ["abc"], console, 30)
    for entry, column in zip(entries, record.columns, strict=True):
        run = entry.runs[0][0]
        text = escape_control_chars(run.text.lstrip("\n"))
        assert "".join(f.text for f in column.frames) == text
        times = [frame.at_s for frame in column.frames]
        assert times == sorted(times)
        assert times[-1] == pytest.approx(run.ttft_s + run.decode_s)
        drafted = sum(frame.source != "model" for frame in column.frames)
        assert drafted == sum(step.accepted for step in run.steps)


def test_prompts_beyond_those_shown_are_measured_all_the_same(model):
    screen = io.StringIO()
    settings = settings_of(model, modes=demo_view.MODES)
    entries, records = demo_view.compare(
        model, "a", ["a"], ["a", "b", "c"], settings, max_new_tokens=4, console=Console(file=screen)
    )
    assert ([len(e.runs) for e in entries], len(records)) == ([3, 3], 1)
    assert screen.getvalue().count("[plain") == 1


def test_an_interruption_gives_the_cursor_back(model, terminal, screen, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_view.SideBySide, "_draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare(model, ["abc"], terminal)
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")


def test_who_begins_changes_from_prompt_to_prompt(model, monkeypatch):
    begun = []
    watch = demo_view.SideBySide.watch

    def note(self, setting, answer):
        begun.append(setting.mode)
        watch(self, setting, answer)

    monkeypatch.setattr(demo_view.SideBySide, "watch", note)
    compare(model, ["a", "b"], Console(file=io.StringIO()), 4)
    assert begun == ["plain", "auto", "plain", "auto", "auto", "plain"]  # the first two warm up


@pytest.mark.real
@pytest.mark.long
def test_demo_on_the_real_model(program, monkeypatch):
    monkeypatch.setattr("layerskip.cli.demo.SCENES", SCENES[2:])
    flags = ("--max-new-tokens", "6", "--dtype", "float32", "--json")
    status, out, _ = program("demo", *flags)
    assert status == 0
    (scene,) = json.loads(out)["scenes"]
    assert [row["identical_to_plain"] for row in scene["rows"]] == [1.0, 1.0]
