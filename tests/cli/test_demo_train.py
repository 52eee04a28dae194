"""`layerskip demo --train` on a tiny checkpoint."""

import importlib.util
import io
import json

import pytest
import torch
from rich.console import Console

from layerskip import LayerSkipModel
from layerskip.cli import demo_train
from layerskip.cli.demo_progress import TrainBars
from layerskip.data.extraction import EXAMPLE, FIELDS
from layerskip.training import Progress

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:warmup_steps is 10",  # runs here have one step
    "ignore:.* of 20 rows of",  # too long: a byte is a token here
)


@pytest.fixture
def demo(run, tmp_path, monkeypatch):
    """Run it for one step: (exit status, stdout, stderr)."""
    monkeypatch.setattr(demo_train, "ROWS", 20)
    monkeypatch.setattr(demo_train, "HELD_OUT", 2)
    monkeypatch.setattr(demo_train, "NEW_TOKENS", 6)
    monkeypatch.setattr(demo_train, "LOG_STEPS", 1)

    def call(*flags):
        folder = ("--folder", tmp_path / "runs" / "demo")
        return run("demo", "--train", "--no-compile", "--minutes", 1e-6, *folder, *flags)

    return call


def test_before_and_after_and_an_ordinary_checkpoint(demo, tmp_path):
    status, out, err = demo()
    assert status == 0, err
    folder = tmp_path / "runs" / "demo"
    for word in ("before training, 1 of 2", "after training, 2 of 2", "exact match", "0 of 2"):
        assert word in out
    assert "step 1, 0:00 left: loss" in out
    assert str(folder) in out.replace("\n", "")

    trained = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)
    assert trained.settings.exit_layer == 1
    assert trained.settings.prompt_form.example == EXAMPLE
    assert not list(folder.glob("checkpoint-*"))
    for name, n in {"rows.jsonl": 20, "held-out.jsonl": 2}.items():
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        assert (len(rows), set(rows[0])) == (n, {"prompt", "completion"})
    assert json.loads((folder / "train.json").read_text())["max_minutes"] == 1e-6


def test_json_is_all_there_is_on_stdout(demo, folder, tmp_path):
    status, out, err = demo("--json")
    assert status == 0, err
    document = json.loads(out)
    assert (document["model"], document["steps"]) == (str(folder), 1)
    assert document["folder"] == str(tmp_path / "runs" / "demo")
    before, after = document["tasks"]
    assert (before["task"], after["task"]) == ("before training", "after training")
    assert (before["samples"], after["samples"]) == (2, 2)
    for task in (before, after):
        assert (task["valid"], task["exact"], task["exit_layer"]) == (0, 0, 1)
        assert 0 <= task["agreement"] <= 1
    assert [row["draft_from"] for row in before["rows"]] == [None, "n-gram"]
    assert [row["draft_from"] for row in after["rows"]] == [None, "both", "early-exit"]
    assert [row["identical_to_plain"] for row in after["rows"]] == [1.0, 1.0, 1.0]


def test_answers_left_out_of_the_speedups_are_counted():
    rows = [
        {"mode": mode, "tokens_per_s": 10.0, "speedup_without_loops": None}
        | {"identical_to_plain": 1.0, "looping": 0.5, "echoing": 0.0}
        for mode in ("plain", "self-speculative")
    ]
    evaluation = demo_train.Evaluation(
        {"task": "before training", "samples": 4, "rows": rows}, ["{}"] * 4, 0, 0, 8, None, {}
    )
    console = Console(file=io.StringIO(), width=100)
    demo_train._show_figures(console, evaluation, evaluation)
    lines = [
        line for line in console.file.getvalue().splitlines() if "left out of the speedups" in line
    ]
    assert len(lines) == 1
    assert "loops" in lines[0]
    assert lines[0].count("2 of 4") == 2


def test_a_folder_in_use_is_left_alone(demo, tmp_path):
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("kept")
    status, out, err = demo()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "is not empty: choose another --folder" in err
    assert [file.name for file in folder.iterdir()] == ["mine.txt"]


def test_after_ctrl_c_it_can_begin_anew(demo, tmp_path, monkeypatch):
    def interrupted(*_):
        assert (tmp_path / "runs" / "demo" / "rows.jsonl").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_train, "_train", interrupted)
        status, _, _ = demo()
    assert status != 0
    assert not (tmp_path / "runs" / "demo").exists()
    assert demo()[0] == 0


def test_a_result_stays_whatever_happens_behind_it(demo, tmp_path, monkeypatch):
    def interrupted(*_):
        (tmp_path / "runs" / "demo" / "model.safetensors").write_bytes(b"trained")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_train, "_train", interrupted)
    assert demo()[0] == 130
    assert (tmp_path / "runs" / "demo" / "model.safetensors").read_bytes() == b"trained"


def test_a_gguf_file_is_refused_first(demo, tmp_path, monkeypatch):
    monkeypatch.delattr(demo_train, "evaluate")
    status, out, err = demo("--model", tmp_path / "m.gguf")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "GGUF files cannot be trained" in err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_said_first(demo, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.delattr(demo_train, "evaluate")
    status, out, err = demo()
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(tmp_path / "runs" / "demo") in err


@pytest.mark.parametrize("missing", ["accelerate", "datasets"])
def test_what_is_missing_is_said_before_anything_else(demo, tmp_path, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    status, out, err = demo()
    assert (status, out) == (1, "")
    assert err == f"layerskip: training needs {missing}; run: pip install 'layerskip[train]'\n"
    assert not (tmp_path / "runs").exists()


def test_several_gpus_are_refused_first(demo, tmp_path, monkeypatch):
    monkeypatch.delattr(demo_train, "evaluate")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, out, err = demo("--device", "cuda:1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "CUDA_VISIBLE_DEVICES" in err
    assert not (tmp_path / "runs").exists()


def test_the_exit_is_after_an_eighth_of_the_layers():
    assert [demo_train.exit_of(n) for n in (30, 16, 4, 2)] == [4, 2, 1, 1]
    with pytest.raises(ValueError, match="single layer"):
        demo_train.exit_of(1)


def test_valid_is_one_object_with_all_fields():
    right = json.dumps(dict.fromkeys(FIELDS))
    assert demo_train.is_valid(right)
    assert not demo_train.is_valid(json.dumps({"kind": "order"}))
    assert not demo_train.is_valid(f"{right} and more")
    assert not demo_train.is_valid("[" * 100_000)


# --- progress


LOGS = {"loss": 0.5, "accuracy_exit_4": 0.25, "accuracy_exit_30": 0.75, "learning_rate": 1e-4}


def test_bars_on_a_terminal_have_time_left_loss_and_every_exit():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with TrainBars(console, 10.0) as bars:
        assert "loading" in render(bars)
        bars(Progress(0, 100, {}))
        bars(Progress(3, 100, LOGS))
        shown = render(bars)
    lines = [line.strip() for line in shown.splitlines()]
    assert [line.split("  ")[0] for line in lines] == ["training", "loss", "exit 4", "exit 30"]
    assert "step 3, 10:00 left" in shown
    assert shown.count("█") == 40 + 10 + 30  # the first loss, and both accuracies of 40
    assert "learning_rate" not in shown
    assert screen.getvalue().endswith("\x1b[?25h")


def render(bars):
    screen = io.StringIO()
    Console(file=screen, width=100).print(bars)
    return screen.getvalue()
