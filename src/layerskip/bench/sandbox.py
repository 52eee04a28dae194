"""Does a generated program run to its end? Asked in a limited process of its own."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

_CONFINED = Path(__file__).with_name("confined.py")
_PIPE_BYTES = 1 << 16
_DYING_S = 5.0  # a killed process is given this long


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_s: seconds of processor time.
        wall_s: seconds in all; longer than `cpu_s`, since the machine may be busy.
        memory_bytes: address space.
        file_bytes: what it may write into its folder.
    """

    cpu_s: int = 5
    wall_s: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20


def runs_to_end(program: str, limits: Limits | None = None) -> bool:
    """Whether a Python program ends without an exception, within the limits.

    The program runs in `python -I -S` with an empty environment, in a temporary folder, without
    input; what it prints is dropped. It has no network, starts no process and writes nothing
    outside its folder (see `confined.py` for how, and docs/tasks.md for what holds where). At the
    end, or when time is up, its whole process group is killed. An early exit of any status is no
    end: only the line after the program's last one reports it, with a word that is drawn for this
    run, and that a program made to find it can find.

    This keeps accidents and ordinary mischief away from the machine. It is no wall against a
    program that is written to break out: for that, run everything in a container.

    Raises:
        ValueError: this platform cannot limit a process.
    """
    if os.name != "posix":
        raise ValueError("generated code runs on Linux and macOS only: nothing limits it elsewhere")
    limits = limits or Limits()
    word = secrets.token_hex(16)
    folder = tempfile.mkdtemp(prefix="layerskip-")
    try:
        return _report_of(program, word, limits, folder) == word.encode()
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder that a stranger filled: `shutil.rmtree` gives up where it is nested too deeply."""
    while found := list(os.scandir(folder)):
        for entry in found:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            for inner in list(os.scandir(entry.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # its ".." changes
                os.rename(inner.path, os.path.join(folder, secrets.token_hex(16)))
            os.rmdir(entry.path)
    os.rmdir(folder)


@functools.cache
def kernel_confines() -> bool:
    """Whether the kernel itself confines programs here, beside Python's hook: see docs/tasks.md."""
    asked = "from __main__ import by_kernel\nassert 'calls' in by_kernel and len(by_kernel) > 1"
    return sys.platform == "linux" and runs_to_end(asked)


def _report_of(program: str, word: str, limits: Limits, folder: str) -> bytes:
    """Run the program and return what came through the pipe for the report."""
    receiver, sender = os.pipe()
    with open(receiver, "rb", buffering=0) as reports:
        try:
            job = {"program": program, "word": word, "report_to": sender, **asdict(limits)}
            Path(folder, "job.json").write_text(json.dumps(job), encoding="utf-8")
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_CONFINED)],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(sender,),
                start_new_session=True,
            )
        finally:
            os.close(sender)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limits.wall_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # The pipe ends when the last process that holds it is gone.
        report = b""
        while len(report) < _PIPE_BYTES and select.select([reports], [], [], _DYING_S)[0]:
            part = reports.read(_PIPE_BYTES)
            if not part:
                break
            report += part
        return report
