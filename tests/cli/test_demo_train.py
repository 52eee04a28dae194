"""`layerskip demo --train` on a tiny checkpoint and a library of our own."""

import importlib.util
import json

import pytest
import torch

from layerskip import LayerSkipModel
from layerskip.cli import demo_train
from layerskip.training import python_functions

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore:warmup_steps is 10",  # runs here have one step
)


@pytest.fixture
def demo(run, tmp_path, monkeypatch):
    """Run it for one step: (exit status, stdout, stderr)."""
    library = tmp_path / "library"
    library.mkdir()
    for i in range(6):
        source = f'def f{i}(x):\n    """Add {i}."""\n    y = x + {i}\n    return y\n'
        (library / f"m{i}.py").write_text(source)
    monkeypatch.setattr(python_functions, "standard_library", lambda: library)
    monkeypatch.setattr(demo_train, "HELD_OUT", 2)
    monkeypatch.setattr(demo_train, "LOG_STEPS", 1)

    def call(*flags):
        folder = ("--folder", tmp_path / "runs" / "demo")
        short = ("--minutes", 1e-6, "--max-new-tokens", 6)
        return run("demo", "--train", "--no-compile", *short, *folder, *flags)

    return call


def test_before_and_after_and_an_ordinary_checkpoint(demo, tmp_path):
    status, out, err = demo()
    assert status == 0, err
    folder = tmp_path / "runs" / "demo"
    assert "4 functions of this Python's library" in out
    for word in ("before training, 1 of 2", "after training, 2 of 2", "layers run", "cannot"):
        assert word in out
    assert "█" in out
    assert str(folder) in out.replace("\n", "")
    assert "step 1/" in err
    assert "accuracy_exit_1" in err
    assert "learning_rate" not in err

    trained = LayerSkipModel.from_pretrained(folder, dtype="float32", compile=False)
    assert trained.settings.exit_layer == 2  # the exit with a loss at every step
    assert not list(folder.glob("checkpoint-*"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert (len(rows), set(rows[0])) == (4, {"prompt", "completion"})
    assert json.loads((folder / "train.json").read_text())["max_minutes"] == 1e-6


def test_json_is_all_there_is_on_stdout(demo, folder, tmp_path):
    status, out, err = demo("--json")
    assert status == 0, err
    document = json.loads(out)
    assert (document["model"], document["steps"]) == (str(folder), 1)
    assert document["folder"] == str(tmp_path / "runs" / "demo")
    assert [e["exit_layer"] for e in document["exits"]] == [1, 2]
    for e in document["exits"]:
        assert 0 <= e["agreement_before"] <= 1
        assert 0 <= e["agreement_after"] <= 1
    before, after = document["tasks"]
    assert (before["task"], after["task"]) == ("before training", "after training")
    assert (before["samples"], after["samples"]) == (2, 2)
    assert [row["draft_from"] for row in before["rows"]] == [None, "n-gram"]
    assert [row["draft_from"] for row in after["rows"]] == [None, "both"]
    assert [row["identical_to_plain"] for row in after["rows"]] == [1.0, 1.0]


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
    monkeypatch.delattr(demo_train, "_evaluate")
    status, out, err = demo("--model", tmp_path / "m.gguf")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "GGUF files cannot be trained" in err
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_said_first(demo, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.delattr(demo_train, "_evaluate")
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
    monkeypatch.delattr(demo_train, "_evaluate")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    status, out, err = demo("--device", "cuda:1")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "CUDA_VISIBLE_DEVICES" in err
    assert not (tmp_path / "runs").exists()


def test_exits_are_few_and_of_the_lower_half():
    assert demo_train.exits_of(30) == [3, 7, 11, 15]
    assert demo_train.exits_of(4) == [1, 2]
    assert demo_train.exits_of(2) == [1]
    with pytest.raises(ValueError, match="single layer"):
        demo_train.exits_of(1)
