"""Help, version and `pull`."""

import json
import logging
import re
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch

from layerskip import __version__, paths
from layerskip.cli import output as outputs
from layerskip.model import hub as source

COMMANDS = [
    "demo",
    "pull",
    "list",
    "rm",
    "generate",
    "chat",
    "tune",
    "bench",
    "eval",
    "export",
    "lens",
    "train",
]


def test_the_program_lists_its_commands(program):
    status, out, _ = program("--help")
    assert status == 0
    assert all(command in out for command in COMMANDS)
    assert program() == (
        2,
        out,
        "layerskip: name a command, such as layerskip demo (see layerskip --help)\n",
    )


def test_version_and_unknown_command(program):
    assert program("--version")[1].strip().endswith(__version__)
    status, _, err = program("fly")
    assert status == 2
    assert "No such command 'fly'" in err


def test_pull_of_what_is_there_prints_the_folder(program, tmp_path, monkeypatch):
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(source, "_check", lambda *_: None)
    (tmp_path / "smollm2-135m").mkdir()
    for name in ("model.gguf", *source.FILES_BESIDE):
        (tmp_path / "smollm2-135m" / name).touch()
    assert program("pull", "smollm2-135m") == (0, f"{tmp_path / 'smollm2-135m'}\n", "")
    result = json.loads(program("pull", "smollm2-135m", "--json")[1])
    assert result == {
        "name": "smollm2-135m",
        "folder": str(tmp_path / "smollm2-135m"),
        "path": str(tmp_path / "smollm2-135m"),
        "fetched": False,
    }


def test_pull_of_something_else_is_refused(program, tmp_path):
    status, _, err = program("pull", "gpt-5")
    assert status == 1
    assert "neither a hub id (owner/name or owner/name:Q4_K_M) nor one of: smollm2-135m" in err
    status, _, err = program("pull", tmp_path)
    assert status == 2
    assert "is a folder or file here: there is nothing to fetch" in err


@pytest.mark.parametrize("command", ["pull", "rm", "generate --model", "chat --model"])
def test_a_name_of_5000_characters_is_one_short_line(program, command):
    status, out, err = program(*command.split(), "a" * 5000)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"layerskip: .{0,30}a{80}\.\.\. \(5,000 characters\).*\n", err)
    assert "Errno" not in err


def test_cached_models_are_listed_and_removed(program, tmp_path, monkeypatch):
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "no models are in the cache" in program("list")[1]
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "model.gguf").write_bytes(bytes(1_500_000))
    (older := tmp_path / "smollm2-135m-layerskip-01234567-1").mkdir()
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "evil\x1b]0;title\x07-Q4_K_M.gguf").write_bytes(bytes(2_000_000))
    (snapshot / "tiny-Q4_K_M.gguf").write_bytes(bytes(2_000_000))
    status, out, _ = program("list")
    assert status == 0
    assert "smollm2-135m (incomplete)" in out
    assert "owner/tiny:Q4_K_M" in out
    assert "\x1b" not in out
    rows = json.loads(program("list", "--json")[1])
    assert {row["name"]: row["bytes"] for row in rows}["smollm2-135m"] == 1_500_000
    assert program("rm", "smollm2-135m") == (0, "smollm2-135m: 1.5 MB freed\n", "")
    assert older.is_dir()  # of another model, whose name begins like that
    assert program("rm", "smollm2-135m-layerskip")[0] == 0
    assert not older.is_dir()
    assert program("rm", "owner/tiny", "--json")[0] == 0
    assert json.loads(program("list", "--json")[1]) == []
    status, _, err = program("rm", "../hub")
    assert status == 1
    assert "../hub is not in the cache; layerskip list shows what is" in err


def test_too_little_memory_is_said_with_what_to_do(program, monkeypatch):
    for error in (
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    ):
        fail = mock.Mock(side_effect=error)
        monkeypatch.setattr("layerskip.cli.config_flags.load_model", fail)
        status, _, err = program("generate", "--prompt", "abc")
        assert status == 1
        assert err == (
            "layerskip: out of memory; try --dtype bfloat16, a smaller model or, on a CPU,"
            " --weights int8\n"
        )


def test_too_little_memory_to_train_is_said_with_what_to_do(program, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("layerskip.cli.train.train", fail)
    settings = ("--model", "m", "--data", "d.jsonl", "--output", "o")
    status, _, err = program("train", *settings)
    assert status == 1
    assert err.startswith("layerskip: out of memory; try a smaller --batch-size")


def test_python_runs_the_package():
    command = [sys.executable, "-m", "layerskip", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"layerskip, version {__version__}\n"


def test_closed_streams_are_no_traceback():
    command = f"{sys.executable} -m layerskip"
    done = subprocess.run(f"{command} --version <&- >&- 2>&-", shell=True, check=False)
    assert done.returncode == 0
    how = {"shell": True, "capture_output": True, "text": True, "check": False}
    done = subprocess.run(f"{command} fly <&- >&-", **how)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = subprocess.run(f"{command} fly 2>&-", **how)
    assert (done.returncode, done.stdout) == (2, "")


def test_a_result_that_cannot_be_written_is_named_and_printed(capsys, tmp_path):
    with pytest.raises(OSError, match=r"gone.r\.json could not be written: No such file"):
        outputs.deliver({"a": 1}, as_json=True, output=tmp_path / "gone" / "r.json")
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_half_an_emoji_in_a_result_is_json_all_the_same(tmp_path):
    outputs.deliver({"path": "x\udce9"}, as_json=False, output=tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == {"path": "x\udce9"}


def test_warnings_are_one_line_and_logs_of_libraries_are_silent(program, monkeypatch):
    def warn(name):
        warnings.warn("first\nsecond\x1b]2;b", UserWarning, stacklevel=1)
        warnings.warn("for developers", FutureWarning, stacklevel=1)
        logging.getLogger("transformers").error("a report")
        raise ValueError("the end")

    monkeypatch.setattr("layerskip.cli.config_flags.load_model", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        _, _, err = program("generate", "--prompt", "abc")
    assert err == "layerskip: first second\\x1b]2;b\nlayerskip: the end\n"
    assert logging.root.manager.disable == logging.NOTSET
