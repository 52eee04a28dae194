"""Generated programs run in bubblewrap where it works, else with resource limits alone.

The module is also the script that the limited process starts with, so it imports nothing but the
standard library.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from dataclasses import asdict, dataclass
from pathlib import Path

NO_BOUNDARY = (
    "generated code runs with resource limits alone, which is no security boundary: it can read and"
    " change your files and use the network; install bubblewrap (bwrap), or run this in a container"
)
_NOT_ALLOWED = (
    "pass@1 runs Python code that the model writes; allow it with --allow-code-execution (in Python:"
    " allow_code_execution=True), or measure speed alone with --ignore-eos"
)
# The rest of the file system is not visible: no /home, no /etc, no sockets of other programs.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of a program.

    Attributes:
        cpu_s: seconds of CPU time of each process.
        wall_s: seconds in all; longer than `cpu_s`, since the machine may be busy.
        memory_bytes: address space of each process (Linux).
        file_bytes: size of each file; in bubblewrap, of all in /tmp together.
        processes: processes and threads of this user; in bubblewrap, of the program's own.
    """

    cpu_s: int = 5
    wall_s: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 16 << 20
    processes: int = 32


def check_allowed(allow_code_execution: bool) -> None:
    """Refuse to run generated code unless the user has allowed it.

    Raises:
        ValueError: it is not allowed, or nothing limits a process on this platform.
    """
    if not allow_code_execution:
        raise ValueError(_NOT_ALLOWED)
    if os.name != "posix":
        raise ValueError("generated code runs on Linux and macOS only: nothing limits it elsewhere")


@functools.cache
def isolation() -> str:
    """Return "bubblewrap" where bwrap is installed and works here, else "rlimits"."""
    works = shutil.which("bwrap") is not None and _completes("", Limits(), in_bubblewrap=True)
    return "bubblewrap" if works else "rlimits"


def runs_to_end(
    program: str, *, allow_code_execution: bool = False, limits: Limits | None = None
) -> bool:
    """Run a Python program and return True if it reaches its end without an exception.

    The program runs in `python -I -S` in a session of its own, with an empty environment, an empty
    temporary directory, no input, and its output discarded. Exiting early with any status is a
    failure: only the line after the program's last one reports success, with a nonce. A program
    written to find the nonce in the interpreter's frames can report a pass that is none.

    Args:
        program: the source.
        allow_code_execution: the user's consent.
        limits: resource limits; None takes the defaults.

    Raises:
        ValueError: see `check_allowed`.
    """
    check_allowed(allow_code_execution)
    return _completes(program, limits or Limits(), in_bubblewrap=isolation() == "bubblewrap")


def _completes(program: str, limits: Limits, *, in_bubblewrap: bool) -> bool:
    nonce = secrets.token_hex(16)
    # The executable itself, not a virtual environment's link to it: with -S there are no packages.
    command = [str(Path(sys.executable).resolve()), "-I", "-S", str(Path(__file__).resolve())]
    if in_bubblewrap:
        command = [*_bubblewrap(limits), *command]
    folder = tempfile.mkdtemp(prefix="layerskip-")
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as job:
            json.dump({"program": program, "nonce": nonce, "limits": asdict(limits)}, job)
            job.seek(0)
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={},
                stdin=job,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                bufsize=0,
            )
        assert process.stdout is not None
        with process.stdout as reports:
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(limits.wall_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            # A report is in the pipe by now; an escaped child that holds the pipe is not waited for.
            os.set_blocking(reports.fileno(), False)
            return reports.read(len(nonce) + 1) == nonce.encode()
    finally:
        with contextlib.suppress(RecursionError):  # directories nested thousands deep
            shutil.rmtree(folder, ignore_errors=True)


def _bubblewrap(limits: Limits) -> list[str]:
    """Return the command that isolates its arguments: only sized tmpfs are writable."""
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent"]
    command += ["--new-session", "--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", "/dev/shm"):  # the latter for locks of multiprocessing
        command += ["--size", str(limits.file_bytes), "--tmpfs", folder]
    python = (sys.base_prefix, sys.base_exec_prefix, str(Path(__file__).resolve()))
    for path in dict.fromkeys((*_SYSTEM, *python)):
        command += ["--ro-bind-try", path, path]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _run_job() -> None:
    """Limit this process, run the program on stdin, and report the nonce on stdout."""
    import resource  # not on Windows, where this module is imported too

    job = json.load(sys.stdin)
    report_to, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    limits = Limits(**job["limits"])
    signal.alarm(int(limits.wall_s) + 5)  # in case the parent was killed
    for limit, value in {
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NPROC: limits.processes,
        resource.RLIMIT_CORE: 0,
    }.items():
        with contextlib.suppress(ValueError, OSError):  # macOS refuses a limit of memory
            resource.setrlimit(limit, (value, value))
    module = types.ModuleType("program")  # dataclasses and pickle look their module up by its name
    sys.modules["program"] = module
    exec(compile(job["program"], "<program>", "exec"), module.__dict__)
    os.write(report_to, job["nonce"].encode())
    os._exit(0)  # nothing that the program deferred to its exit runs after the report


if __name__ == "__main__":
    _run_job()
