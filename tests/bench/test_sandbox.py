"""Generated programs: those that pass, those that fail, and what they cannot reach."""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from layerskip.bench import sandbox
from layerskip.bench.sandbox import Limits, runs_to_end

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits memory, has /proc")


@pytest.fixture
def bubblewrap():
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap (bwrap) is not installed")
    probe = [
        *("bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev"),
        "true",
    ]
    if subprocess.run(probe, check=False, capture_output=True).returncode:
        pytest.skip("bubblewrap cannot make namespaces for this user here")
    return "bubblewrap"


@pytest.fixture(params=["bubblewrap", "rlimits"])
def passes(request, monkeypatch):
    """Run a program in each kind of isolation."""
    isolation = request.param
    if isolation == "bubblewrap":
        request.getfixturevalue("bubblewrap")
    monkeypatch.setattr(sandbox, "isolation", lambda: isolation)

    def call(program, **limits):
        return runs_to_end(program, allow_code_execution=True, limits=Limits(**limits))

    return call


def test_nothing_runs_without_consent(monkeypatch):
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(ValueError, match="--allow-code-execution"):
        runs_to_end("pass")


def test_bubblewrap_is_used_where_it_works(bubblewrap):
    assert sandbox.isolation.__wrapped__() == "bubblewrap"


def test_rlimits_are_used_where_bubblewrap_is_missing_or_fails(monkeypatch):
    for command in (None, shutil.which("false")):
        monkeypatch.setattr(sandbox.shutil, "which", lambda name, command=command: command)
        assert sandbox.isolation.__wrapped__() == "rlimits"


def test_a_program_that_runs_to_its_end_passes(passes):
    for program in (
        "import collections, hashlib, itertools, math, typing, unittest; open('x', 'w').write('x')",
        "import os; assert os.listdir() == []\nassert not set(os.environ) - {'LC_CTYPE', 'PWD'}",
        "import sys; [f.write('x' * 5_000_000) for f in (sys.stdout, sys.stderr)]",
        # it looks up its own module
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "if __name__ == '__main__':\n    input()",
    ):
        assert passes(program)


_WRITE = "import os\nfor i in range(3, 8):\n  try:\n    "
_GO_ON = "  except OSError: pass\n"


def test_exiting_early_fails(passes):
    for program in (
        "assert 1 + 1 == 3",
        "input()",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import numpy",
        # a report needs its nonce
        f"{_WRITE}os.write(i, b'passed')\n{_GO_ON}os._exit(0)",
    ):
        assert not passes(program, wall_s=3)


def test_exceeding_a_limit_fails(passes):
    for program, wall_s in (
        ("import time; time.sleep(600)", 1),
        (f"{_WRITE}while True: os.write(i, bytes(9999))\n{_GO_ON}os._exit(0)", 1),
        ("while True: pass", 5),
        *[("x = bytearray(3 << 30)", 5)] * (sys.platform == "linux"),
        ("with open('x', 'wb') as file: file.write(bytes(40 << 20))", 5),
    ):
        assert not passes(program, cpu_s=1, wall_s=wall_s)


@LINUX
def test_child_processes_and_temporary_folders_are_gone(passes, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    marker = f"60.{os.getpid()}"
    passes(f"import subprocess; open('x', 'w'); subprocess.Popen(['sleep', '{marker}'])")
    passes(f"import subprocess; subprocess.run(['sleep', '{marker}'])", wall_s=1)
    assert all_end(marker)
    assert not list(tmp_path.iterdir())


def all_end(argument):
    """Wait for the processes with this argument to end: the kernel kills them just after bwrap."""
    deadline = time.monotonic() + 5
    while running(argument) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running(argument)


def running(argument):
    """Return the processes that have this argument."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [file] * (argument.encode() in file.read_bytes().split(b"\0"))
        except OSError:  # ended meanwhile
            continue
    return found


def test_in_bubblewrap_there_is_no_network_and_nothing_outside(bubblewrap, tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: bubblewrap)
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempts = {
            "read": f"open({str(kept)!r})",
            "read passwords": "open('/etc/passwd')",
            "write": f"open({str(tmp_path / 'new')!r}, 'w')",
            "write to /usr": "open('/usr/new', 'w')",
            "write to /": "open('/new', 'w')",
            "write to Python": f"open({str(Path(sandbox.__file__))!r}, 'a')",
            "connect": f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)",
            "kill": f"os.kill({os.getpid()}, 0)",
            "fill": "[open(str(i), 'wb').write(bytes(9 << 20)) for i in range(3)]",
        }
        for name, attempt in attempts.items():
            program = (
                f"import os, socket\ntry: {attempt}\nexcept OSError: pass\nelse: raise SystemExit"
            )
            assert runs_to_end(program, allow_code_execution=True), name
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]


@LINUX
def test_a_process_that_leaves_its_group_dies_with_bubblewrap(bubblewrap, monkeypatch):
    monkeypatch.setattr(sandbox, "isolation", lambda: bubblewrap)
    marker = f"61.{os.getpid()}"
    program = f"import subprocess\nsubprocess.Popen(['sleep', '{marker}'], start_new_session=True)"
    runs_to_end(program, allow_code_execution=True)
    assert all_end(marker)
