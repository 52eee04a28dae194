"""Generated programs: what must pass, and what must neither pass nor do harm."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip.bench import confined, sandbox
from layerskip.bench.sandbox import Limits, runs_to_end

QUICK = Limits(cpu_s=5, wall_s=30)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import collections, hashlib, heapq, itertools, math, random, re, typing, unittest",
        "with open('x', 'w') as file: file.write('x')\nassert open('x').read() == 'x'",
        "import os; os.mkdir('a'); os.rmdir('a')",
        "import os; assert not set(os.environ) - {'LC_CTYPE'}",
        "print('x' * 5_000_000)",
        # what looks its own module up
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\nassert A(1).x == 1",
        "if __name__ == '__main__':\n    input()",
    ],
)
def test_a_program_that_runs_to_its_end(program):
    assert runs_to_end(program, QUICK)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "input()",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "import os; os._exit(0)",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import atexit, os; atexit.register(os._exit, 0); sys",
        "import numpy",
        "import __main__; __main__._LIBC",
        "import fcntl, sys; fcntl.fcntl(0, fcntl.F_GETFD) if sys.platform == 'linux' else 1 / 0",
        "def f(): f()\nf()",
    ],
)
def test_whatever_ends_early_fails(program):
    assert not runs_to_end(program, QUICK)


@pytest.mark.parametrize("descriptor", [3, 4, 5])
def test_a_report_needs_its_word(descriptor):
    program = f"import os\nos.write({descriptor}, b'passed')\nos._exit(0)"
    assert not runs_to_end(program, QUICK)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(600)",
        pytest.param(
            "x = bytearray(3 << 30)",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="no limit of memory there"),
        ),
        "with open('x', 'wb') as file: file.write(bytes(40 << 20))",
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.socket()",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1')",
    ],
)
def test_what_uses_more_than_its_share_fails(program):
    assert not runs_to_end(program, Limits(cpu_s=1, wall_s=3))


def test_nothing_outside_the_folder_changes(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    program = f"""
import os, pathlib, shutil
attempts = [
    lambda: open({str(kept)!r}, "w"),
    lambda: os.open({str(kept)!r}, os.O_WRONLY | os.O_TRUNC),
    lambda: os.remove({str(kept)!r}),
    lambda: os.rename({str(kept)!r}, "mine"),
    lambda: os.chmod({str(kept)!r}, 0),
    lambda: os.truncate({str(kept)!r}, 0),
    lambda: shutil.rmtree({str(tmp_path)!r}),
    lambda: pathlib.Path({str(tmp_path / "new")!r}).touch(),
    lambda: os.symlink({str(kept)!r}, "link") or open("link", "w"),
]
done = []
for number, attempt in enumerate(attempts):
    try:
        attempt()
        done.append(number)
    except OSError:
        pass
assert not done, done
"""
    assert runs_to_end(program, QUICK)
    assert kept.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [kept]


_NESTED = """
import os
for chain in range(12):
    at = f"{chain}"
    os.mkdir(at)
    if chain:
        os.rename(f"{chain - 1}", f"{chain}/0")
    for _ in range(99):
        os.mkdir("new")
        os.rename(at, "new/0")
        os.rename("new", at)
open("0", "w").close()
"""


def test_folders_in_folders_are_removed_however_deep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(_NESTED, {})
    assert {entry.name for entry in os.scandir(tmp_path)} == {"11", "0"}
    sandbox._remove(str(tmp_path))
    assert not tmp_path.exists()


def test_folders_that_their_program_closed_are_removed(tmp_path, monkeypatch):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "a" / "b").chmod(0)
    rename = os.rename

    def as_an_ordinary_user(old, new):  # whose folder cannot move unless it may be written to
        assert os.stat(old).st_mode & 0o200
        rename(old, new)

    monkeypatch.setattr(os, "rename", as_an_ordinary_user)
    sandbox._remove(str(tmp_path))
    assert not tmp_path.exists()


def test_terminals_are_not_read():
    ours, theirs = os.openpty()
    try:
        opened = f"import os; os.open({os.ttyname(theirs)!r}, os.O_RDONLY | os.O_NOCTTY)"
        assert not runs_to_end(opened, QUICK)
    finally:
        os.close(ours)
        os.close(theirs)
    assert runs_to_end("assert len(open('/dev/urandom', 'rb').read(4)) == 4", QUICK)


def test_temporary_folders_and_processes_are_gone(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert not runs_to_end("open('x', 'w')\nwhile True: pass", Limits(cpu_s=1, wall_s=3))
    assert not list(tmp_path.iterdir())
    assert not processes_in(tmp_path)


def processes_in(folder):
    """Processes whose working folder is below this one."""
    links = [link for link in Path("/proc").glob("[0-9]*/cwd") if os.access(link, os.R_OK)]
    return [link for link in links if os.path.realpath(link).startswith(str(folder))]


# --- each layer by itself


def run_layer(tmp_path, code):
    """Run code after `import confined` in a process of its own; what it prints as JSON."""
    script = f"import sys; sys.path.insert(0, {str(Path(confined.__file__).parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"{script}import json, os, confined\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_hook_alone_refuses(tmp_path):
    code = """
import pathlib, shutil, sqlite3, ctypes, socket, subprocess, multiprocessing
outside = pathlib.Path(os.getcwd()).parent / "outside"
full = pathlib.Path(os.getcwd()).parent / "full"
full.mkdir()
(full / "kept").touch()
parent = os.open(full, os.O_RDONLY)


def another_interpreter():
    for name in ("_interpreters", "_xxsubinterpreters"):
        try:
            found = __import__(name)
        except ImportError:
            continue
        try:
            made = found.create()
        except Exception as error:  # of a kind that its version has
            raise PermissionError from error
        return made
    raise PermissionError("there is no such module")


attempts = {
    "write": lambda: outside.write_text("x"),
    "append": lambda: open(outside, "a"),
    "make a folder": lambda: outside.mkdir(),
    "database": lambda: sqlite3.connect(outside),
    "history": lambda: __import__("readline").write_history_file(outside),
    "keys and values": lambda: __import__("dbm.gnu").gnu.open(str(outside), "c"),
    "socket": lambda: socket.socket(),
    "fork": lambda: os.fork(),
    "command": lambda: os.system("true"),
    "process": lambda: subprocess.run(["true"]),
    "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "replace": lambda: os.execv("/bin/true", ["true"]),
    "kill": lambda: os.kill(os.getppid(), 0),
    "library": lambda: ctypes.CDLL(None),
    "remove a tree": lambda: shutil.rmtree(full),
    "remove in an open folder": lambda: os.unlink("kept", dir_fd=parent),
    "move out of an open folder": lambda: os.rename("kept", "got", src_dir_fd=parent),
    "open in an open folder": lambda: os.open(
        "new", os.O_CREAT | os.O_WRONLY, dir_fd=os.open(full, os.O_RDONLY)
    ),
    "climb": lambda: open("../outside", "w"),
    "go elsewhere": lambda: os.chdir(full),
    "named pipe": lambda: os.mkfifo(os.path.join(full, "pipe")),
    "child": lambda: multiprocessing.get_context("spawn").Process(target=print).start(),
    "module anew": lambda: sys.modules.pop("posix") and __import__("posix"),
    "starter anew": lambda: (
        sys.modules.pop("_posixsubprocess") and __import__("_posixsubprocess")
    ),
    "shared memory": lambda: __import__("_posixshmem"),
    "another's limits": lambda: __import__("resource").prlimit(os.getppid(), 7, (9, 9)),
    "another's priority": lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19),
    "another's processors": lambda: os.sched_setaffinity(os.getppid(), {0}),
    "attributes": lambda: os.setxattr(full, "user.x", b"x"),
    "times of an open file": lambda: os.utime(os.open(full / "kept", os.O_RDONLY)),
    "memory that is not counted": lambda: os.memfd_create("x"),
    "an interpreter without the hook": another_interpreter,
}
if sys.platform == "darwin":
    for name in ("another's limits", "another's processors", "attributes", "memory that is not counted"):
        del attempts[name]
confined._refuse_what_asks_no_hook()
sys.addaudithook(confined._guard(os.path.realpath(".")))
done = []
for name, attempt in attempts.items():
    try:
        attempt()
        done.append(name)
    except (PermissionError, ImportError):
        pass
open("inside", "w").close()
assert os.listdir(full) == ["kept"]
print(json.dumps(done))
"""
    assert run_layer(tmp_path, code) == []
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_namespaces_alone_cut_off_network_and_files(tmp_path):
    outside = tmp_path / "outside"
    folder = tmp_path / "folder"
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import socket
confined._enter_namespaces(os.getcwd(), 1 << 20)
confined._give_up_privileges()
def works(attempt):
    try:
        attempt()
        return True
    except OSError:
        return False
print(json.dumps({{
    "alone": os.getpid() == 1,
    "only reads": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    "connects": works(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}))),
    "writes outside": works(lambda: open({str(outside)!r}, "w")),
    "writes inside": works(lambda: open("small", "w").close()),
    "writes much": works(lambda: open("large", "wb", 0).write(bytes(1 << 20)) == 1 << 20 or 1 / 0),
    "kills": works(lambda: os.kill({os.getpid()}, 0)),
    "mounts": confined.ctypes.CDLL(None).mount(
        None, b"/", None, 0x1000 | 32, None  # MS_BIND | MS_REMOUNT: to be written again
    ) == 0,
}}), flush=True)
"""
        found = run_layer(folder, code)
    if not found.pop("alone") or not found.pop("only reads"):
        pytest.skip("this user may not have namespaces here, or none with other mounts")
    assert found == {
        "connects": False,
        "writes outside": False,
        "writes inside": True,
        "writes much": True,
        "kills": False,
        "mounts": False,
    }
    assert not outside.exists()
    assert not list(folder.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")
def test_the_kernel_refuses_what_asks_no_hook(tmp_path):
    """What a program that reaches the C library tries, where it may have no namespaces."""
    outside = tmp_path / "outside"
    outside.write_text("as it was")
    folder = tmp_path / "folder"
    folder.mkdir()
    code = f"""
import ctypes, signal, socket, threading
libc = ctypes.CDLL(None)
outside = {os.fsencode(outside)!r}
confined._give_up_privileges()
confined._ask_the_kernel(os.getcwd())
ran = []
thread = threading.Thread(target=ran.append, args=(1,))
thread.start()
thread.join()
calls = {{
    "socket": lambda: libc.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0),
    "fork": libc.fork,
    "program": lambda: libc.execv(b"/bin/true", (ctypes.c_char_p * 2)(b"true", None)),
    "kill": lambda: libc.kill(os.getppid(), 0),
    "rights": lambda: libc.chmod(outside, 0o600),
    "attributes": lambda: libc.setxattr(outside, b"user.a", b"1", 1, 0),
    "owner": lambda: libc.chown(outside, os.getuid(), os.getgid()),
    "whose signal": lambda: libc.fcntl(os.pipe()[0], 8, os.getppid()),  # F_SETOWN
    "which signal": lambda: libc.fcntl(os.pipe()[0], 10, 9),  # F_SETSIG
    "whose, otherwise": lambda: libc.ioctl(os.pipe()[0], 0x8901, ctypes.byref(ctypes.c_int(1))),
}}
files = {{
    "write": lambda: libc.open(outside, os.O_WRONLY),
    "empty": lambda: libc.truncate(outside, 0),
    "create": lambda: libc.open(outside + b"2", os.O_WRONLY | os.O_CREAT, 0o600),
    "remove": lambda: libc.unlink(outside),
    "move away": lambda: libc.rename(outside, b"here"),
}}
assert libc.fcntl(0, 1) != -1  # F_GETFD
open("mine", "w").close()
os.rename("mine", "moved")
os.remove("moved")
open(os.devnull, "w").close()
signal.raise_signal(0)
print(json.dumps({{
    "by kernel": sorted(confined.by_kernel),
    "threads": len(ran),
    "calls": [n for n, call in calls.items() if "calls" in confined.by_kernel and call() != -1],
    "files": [n for n, call in files.items() if "files" in confined.by_kernel and call() != -1],
}}))
"""
    found = run_layer(folder, code)
    if not found["by kernel"]:
        pytest.skip("this kernel has neither, or this machine's calls are not known")
    assert found["threads"] == 1
    assert found["calls"] == []
    assert found["files"] == []
    assert outside.read_text() == "as it was"
