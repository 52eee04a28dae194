"""Signals, progress, and names and answers that a terminal would obey."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from layerskip.cli import output
from layerskip.cli.data import check_finite_file
from layerskip.cli.output import bars, track, waiting
from layerskip.decoding import Piece

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def program(code, *arguments):
    """Start the program in a process of its own, after some lines of Python."""
    prelude = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", prelude + code + "\nfrom layerskip.cli import main\nmain()"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, arguments)], **streams)


def wait_for(path, process):
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)


SIGNALS = pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)


@SIGNALS
def test_a_signal_while_the_program_starts_is_one_line(tmp_path, number, status, word):
    """As in the import of PyTorch, where an exception could end up anywhere."""
    begun = tmp_path / "begun"
    code = f"""
import builtins, pathlib, time
real = builtins.__import__
def slow(name, *arguments):
    if name == "torch":
        pathlib.Path({str(begun)!r}).touch()
        time.sleep(60)
    return real(name, *arguments)
builtins.__import__ = slow
"""
    process = program(code, "generate", "--prompt", "abc")
    wait_for(begun, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (status, "", f"layerskip: {word}\n")


@SIGNALS
def test_a_signal_where_exceptions_are_ignored_ends_the_start_too(number, status, word):
    """A KeyboardInterrupt in `__del__` is printed with a traceback, and the program goes on."""
    code = f"""
import builtins, os
real = builtins.__import__
class Dying:
    def __del__(self):
        os.kill(os.getpid(), {number})
def dying(name, *arguments):
    if name == "click":
        Dying()
    return real(name, *arguments)
builtins.__import__ = dying
"""
    process = program(code, "--version")
    out, err = process.communicate()
    assert (process.returncode, out, err) == (status, "", f"layerskip: {word}\n")


@SIGNALS
def test_a_signal_before_the_program_handles_it_is_one_line(tmp_path, number, status, word):
    begun = tmp_path / "begun"
    code = f"""
import builtins, pathlib, time
real = builtins.__import__
def slow(name, *arguments):
    if name == "click":
        pathlib.Path({str(begun)!r}).touch()
        time.sleep(60)
    return real(name, *arguments)
builtins.__import__ = slow
"""
    process = program(code, "--version")
    wait_for(begun, process)
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (status, "", f"layerskip: {word}\n")


@pytest.mark.parametrize(
    ("module", "function", "lines"),
    [
        ("layerskip.cli.train", "check_packages", ""),
        ("layerskip.training.run", "load_tokenizer", "layerskip: there is no checkpoint yet"),
    ],
)
def test_sigterm_before_the_training_loop_ends_like_ctrl_c(
    folder, tmp_path, module, function, lines
):
    begun, rows = tmp_path / "begun", tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    code = f"""
import importlib, pathlib, time
def slow(*_):
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(60)
setattr(importlib.import_module({module!r}), {function!r}, slow)
"""
    flags = ("--data", rows, "--output", tmp_path / "out", "--exits", "2", "--regime", "task")
    process = program(code, "train", "--model", folder, *flags)
    wait_for(begun, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()[-1]) == (143, "layerskip: terminated")
    assert err.count("\n") == (2 if lines else 1)
    assert err.startswith(lines)


def test_ctrl_c_keeps_the_answers_so_far(folder, tmp_path):
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.json"
    prompts.write_text("abc\nde\nfgh\n")
    begun = tmp_path / "begun"
    code = f"""
import pathlib, time
from layerskip import LayerSkipModel
answer, calls = LayerSkipModel.answer, []
def slow(self, *arguments, **options):
    calls.append(1)
    if len(calls) == 3:
        pathlib.Path({str(begun)!r}).touch()
        time.sleep(60)
    return answer(self, *arguments, **options)
LayerSkipModel.answer = slow
"""
    flags = ("--model", folder, "--no-compile", "--max-new-tokens", 2, "--output", answers)
    process = program(code, "generate", "--prompts", prompts, *flags)
    wait_for(begun, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert (process.returncode, err) == (130, "layerskip: interrupted\n")
    assert len(json.loads(answers.read_text())) == 2


def test_sigterm_keeps_what_bench_has_measured(folder, tmp_path):
    prompts, result = tmp_path / "prompts.txt", tmp_path / "bench.json"
    prompts.write_text("abc\n\nde\n")
    begun = tmp_path / "begun"
    code = f"""
import pathlib, time
from layerskip.bench.systems import LayerSkipSystem
answer, calls = LayerSkipSystem.answer, []
def slow(self, *arguments):
    calls.append(1)
    if len(calls) == 3:  # after a warm-up and the first prompt
        pathlib.Path({str(begun)!r}).touch()
        time.sleep(60)
    return answer(self, *arguments)
LayerSkipSystem.answer = slow
"""
    flags = ("--modes", "plain", "--max-new-tokens", 2, "--no-compile", "--output", result)
    process = program(code, "bench", "--model", folder, "--task", prompts, *flags)
    wait_for(begun, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert (process.returncode, err) == (143, "layerskip: terminated\n")
    document = json.loads(result.read_text())
    assert (document["interrupted"], document["samples"]) == (True, 1)


NAME = "ev\x1b]0;owned\x07"
ESCAPED = "ev\\x1b]0;owned\\x07"


def test_names_in_spinners_and_bars_are_escaped(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with output.waiting(f"loading {NAME}"):
        pass
    with output.bars() as report:
        report(f"writing {NAME}", 1, 2)
    list(output.track([1], NAME))
    output.log_work(NAME)
    output.log_stderr(NAME)
    shown = screen.getvalue()
    assert shown.count("owned") >= 5
    assert "\x1b]0;" not in shown
    assert "\x07" not in shown
    assert ESCAPED in shown


def test_a_terminal_shows_a_carriage_return_of_an_answer(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.show_pieces([Piece(text="safe\rrm -rf")], show_draft=False)
    assert capsys.readouterr().out == "safe\\x0drm -rf\n"


def test_files_without_an_end_are_refused(run):
    for flags, status, words in (
        (("--datastore", "/dev/zero"), 2, "/dev/zero has more than 16 MiB"),
        (("--prediction", "/dev/zero"), 1, "/dev/zero is a device, not a file"),
        (("--prompts", "/dev/zero"), 1, "/dev/zero is a device, not a file"),
    ):
        prompt = () if "--prompts" in flags else ("--prompt", "abc")
        code, out, err = run("generate", *prompt, *flags)
        assert (code, out, err.count("\n")) == (status, "", 1)
        assert words in err


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("index", "x.table", "--data", "/dev/zero"), "/dev/zero is a device, not a file"),
        (("eval", "--perplexity", "/dev/zero"), "/dev/zero is a device, not a file"),
        (("chat", "--datastore", "/dev/zero"), "/dev/zero has more than 16 MiB"),
        (("chat", "--draft-text", "/dev/zero"), "/dev/zero has more than 16 MiB"),
    ],
)
def test_files_without_an_end_are_refused_by_other_commands(program, command, words):
    _, out, err = program(*command)
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_a_pipe_is_a_file_of_prompts(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_finite_file(pipe)
    with pytest.raises(ValueError, match="is a device"):
        check_finite_file("/dev/urandom")


def test_an_output_that_is_a_link_to_itself_is_refused(run, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    status, out, err = run("generate", "--prompt", "abc", "--output", loop)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "a link to itself" in err


def test_a_report_does_not_follow_links_out_of_its_folder(run, tmp_path):
    target, report = tmp_path / "target", tmp_path / "report"
    target.write_text("mine")
    report.mkdir()
    (report / "report.md").symlink_to(target)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("abc\n")
    status, _, err = run("bench", "--task", prompts, "--report", report)
    assert (status, err.count("\n")) == (1, 1)
    assert "outside of its folder" in err
    assert target.read_text() == "mine"


TERMINAL_OR_NOT = pytest.mark.parametrize("is_terminal", [True, False])


def stderr(monkeypatch, is_terminal):
    """Return the captured stderr."""
    written = io.StringIO()
    written.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", written)
    monkeypatch.setenv("TERM", "xterm")
    return written


@TERMINAL_OR_NOT
def test_a_bar_is_for_terminals(monkeypatch, is_terminal):
    written = stderr(monkeypatch, is_terminal)
    with bars() as report:
        report("perplexity of notes[draft].txt", 1, 4)
    shown = written.getvalue()
    assert all(word in shown for word in ("notes[draft].txt", "1/4")) if is_terminal else not shown


@TERMINAL_OR_NOT
def test_things_are_counted_on_terminals(monkeypatch, is_terminal):
    written = stderr(monkeypatch, is_terminal)
    assert list(track([1, 2, 3], "prompts")) == [1, 2, 3]
    assert ("prompts" in written.getvalue()) == is_terminal


@TERMINAL_OR_NOT
def test_waiting_is_said_on_terminals(monkeypatch, is_terminal):
    written = stderr(monkeypatch, is_terminal)
    with waiting("loading a[b]"):
        pass
    assert ("loading a[b]" in written.getvalue()) == is_terminal
    written.seek(0)
    written.truncate()
    with waiting("loading", is_shown=False):
        pass
    assert not written.getvalue()
