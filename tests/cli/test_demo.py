"""`layerskip demo`: three tasks, plain and auto side by side."""

import importlib.util
import io
import json
import shutil

import pytest
from rich.console import Console

from layerskip import LayerSkipModel
from layerskip.cli import demo as demo_tasks
from layerskip.cli import demo_view
from layerskip.cli.demo import TASKS

SHORT = ("--max-new-tokens", 8)


@pytest.fixture(scope="module")
def model(folder):
    return LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)


@pytest.fixture(scope="module")
def trained_folder(folder, tmp_path_factory):
    """The same weights with an exit layer in the settings."""
    path = tmp_path_factory.mktemp("demo") / "trained"
    shutil.copytree(folder, path)
    settings = {"eos_token_id": 2, "assistant_early_exit": 1, "num_assistant_tokens": 2}
    (path / "generation_config.json").write_text(json.dumps(settings))
    return path


def words(text):
    return " ".join(text.split())


def test_lines_a_table_bars_and_words(run):
    status, out, err = run("demo", "--no-compile", *SHORT)
    assert (status, err) == (0, "")
    assert "\x1b" not in out  # no terminal, no live display
    for task in TASKS:
        for i, text in enumerate(task.texts, 1):
            assert f"{task.name}, {i} of {len(task.texts)}" in out
            assert text in out
    assert out.count("[plain") == out.count("[auto") == sum(len(task.texts) for task in TASKS)
    assert "4 of 4" in out  # identical to plain
    assert "12 of 12" in out  # in total
    assert "█" in out
    assert "not trained with layer dropout" in words(out)
    assert "n-grams alone" in words(out)
    assert "layerskip tune" in out
    assert "layerskip train" in out


def test_a_trained_checkpoint_says_where_it_exits(trained_folder, run):
    status, out, _ = run("demo", "--model", trained_folder, "--no-compile", *SHORT)
    assert status == 0
    out = words(out)
    assert "early exit after 1 of 4 layers" in out
    assert "not trained" not in out


def test_one_document_with_the_rows_of_bench(run, folder, tmp_path):
    output = tmp_path / "demo.json"
    status, out, _ = run("demo", "--no-compile", "--json", "--output", output, *SHORT)
    assert status == 0
    document = json.loads(out)
    assert document == json.loads(output.read_text())
    assert list(document) == ["environment", "model", "tasks", "total", "elapsed_s"]
    assert document["elapsed_s"] > 0
    assert document["model"] == str(folder)
    assert [(t["task"], t["samples"]) for t in document["tasks"]] == [
        (task.name, len(task.texts)) for task in TASKS
    ]
    for rows in (*(group["rows"] for group in document["tasks"]), document["total"]):
        assert [(r["mode"], r["draft_from"]) for r in rows] == [("plain", None), ("auto", "n-gram")]
        assert [r["identical_to_plain"] for r in rows] == [1.0, 1.0]  # float32: to the token
        assert rows[0]["speedup"] == 1.0
        assert rows[1]["tokens_per_s"] > 0
    for i, row in enumerate(document["total"]):
        of_tasks = [group["rows"][i] for group in document["tasks"]]
        assert row["new_tokens"] == sum(r["new_tokens"] for r in of_tasks)
        assert row["drafted"] == sum(r["drafted"] for r in of_tasks)


def test_picture(run, tmp_path):
    file = tmp_path / "demo.png"
    status, out, _ = run("demo", "--no-compile", "--picture", file, *SHORT)
    assert status == 0
    assert f"Drawn: {file}" in out
    assert file.read_bytes().startswith(b"\x89PNG")


def test_picture_without_matplotlib_is_refused_at_once(run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    status, out, err = run("demo", "--picture", tmp_path / "demo.png")
    assert (status, out) == (1, "")
    assert err == ("layerskip: --picture needs matplotlib; run: pip install 'layerskip[plot]'\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--minutes", 1), "--minutes and --folder belong to --train"),
        (("--folder", "x"), "--minutes and --folder belong to --train"),
        (("--picture", "no/such/folder.png"), "the folder of --picture"),
        (("--max-new-tokens", 1), "1 is not in the range"),
        (("--train", "--minutes", 0), "0.0 is not in the range"),
    ],
)
def test_bad_flags_are_one_line(run, flags, message):
    status, out, err = run("demo", *flags)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


# --- what is asked


def test_only_without_trained_exits_the_model_is_asked_in_a_chat(model, trained_folder):
    trained = LayerSkipModel.from_pretrained(trained_folder, dtype="float32", compile=False)
    parse, summarize, code = TASKS
    for task in TASKS:
        text = task.texts[0]
        assert task.prompt(text, trained) == task.template.format(text=text)
    assert parse.prompt("Wake me", model) == "Wake me\n"
    for task in (summarize, code):
        (message,) = task.prompt(task.texts[0], model)
        assert message["role"] == "user"
        assert task.texts[0] in message["content"]


def test_without_a_chat_template_the_template_is_asked(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    assert demo_tasks.TASKS[2].prompt("def f():", model) == "def f():"


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


def test_live_columns_fill_and_both_answers_stay(model, terminal, screen, monkeypatch):
    monkeypatch.setattr(demo_view, "REFRESH_S", -1.0)  # every token is drawn
    entries = demo_view.compare(
        model, "letters", ["abc", "xyz"], ["abc", "xyz"], max_new_tokens=40, console=terminal
    )
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


def test_an_interruption_gives_the_cursor_back(model, terminal, screen, monkeypatch):

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_view.SideBySide, "_draw", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_view.compare(model, "a", ["abc"], ["abc"], max_new_tokens=8, console=terminal)
    assert screen.getvalue().rstrip().endswith("\x1b[?25h")


def test_who_begins_changes_from_prompt_to_prompt(model, monkeypatch):
    begun = []
    watch = demo_view.SideBySide.watch

    def note(self, setting, answer):
        begun.append(setting.mode)
        watch(self, setting, answer)

    monkeypatch.setattr(demo_view.SideBySide, "watch", note)
    console = Console(file=io.StringIO())
    demo_view.compare(model, "a", "ab", ["a", "b"], max_new_tokens=4, console=console)
    assert begun == ["plain", "auto", "plain", "auto", "auto", "plain"]  # the first two warm up


@pytest.mark.real
@pytest.mark.long
def test_demo_on_the_real_model(program, monkeypatch):
    monkeypatch.setattr("layerskip.cli.demo.TASKS", TASKS[1:2])
    flags = ("--max-new-tokens", "6", "--dtype", "float32", "--model", "smollm2-135m", "--json")
    status, out, _ = program("demo", *flags)
    assert status == 0
    document = json.loads(out)
    assert [row["mode"] for row in document["total"]] == ["plain", "auto"]
    assert [row["identical_to_plain"] for row in document["total"]] == [1.0, 1.0]
