"""Started by `sandbox.py` as a program: gives up its rights, then runs what is in job.json.

Three layers, each of which holds where another does not:

1. limits of the process (processor time, memory, size of files, open files): Linux, macOS but for
   memory;
2. an audit hook, which Python asks before it opens a file for writing, starts a process, or touches
   a socket: everywhere, but only what goes through Python;
3. namespaces of its own: no network, no other process in sight, all file systems read-only and a
   temporary one in place of the working folder: Linux, where an ordinary user may have them.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

# Linux, from its headers <sched.h>, <sys/mount.h>, <sys/prctl.h>, <asm/unistd.h>.
_NEW_MOUNTS, _NEW_IPC, _NEW_USER, _NEW_PIDS, _NEW_NETWORK = (
    0x00020000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_PRIVATE, _RECURSIVE, _NO_SETUID, _NO_DEVICES = 1 << 18, 1 << 14, 2, 4
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY, _CURRENT_FOLDER = 442, 0x8000, 1, -100
_KILL_WITH_PARENT, _NO_NEW_RIGHTS = 1, 38
_CAPABILITIES_VERSION = 0x20080522
_GRACE_S = 5.0

# Events of sys.audit: https://docs.python.org/3/library/audit_events.html
_REFUSED = (
    "_posixsubprocess.",
    "ctypes.",
    "os.chdir",
    "os.chmod",
    "os.chown",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.removexattr",
    "os.setxattr",
    "os.system",
    "resource.prlimit",
    "socket.",
    "sqlite3.",
    "subprocess.",
    "syslog.",
)
_CHANGES_PATHS = (
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
    "shutil.rmtree",
)
# Where these have the descriptors of open folders that their paths may start from.
_FOLDERS = {
    "os.link": (2, 3),
    "os.mkdir": (2,),
    "os.remove": (1,),
    "os.rename": (2, 3),
    "os.rmdir": (1,),
    "os.symlink": (2,),
    "os.utime": (3,),
}
# Made anew, they would have again what `_refuse_what_asks_no_hook` takes away.
_NOT_IMPORTED = ("_posixshmem", "_posixsubprocess", "posix")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the job and report its word when the program has come to its end."""
    folder = os.getcwd()
    with open("job.json", encoding="utf-8") as file:
        job = json.load(file)
    os.remove("job.json")
    program, word, report_to = job["program"], job["word"].encode(), job["report_to"]
    # Where nobody is left to end it: SIGALRM does, unless the program takes it for itself.
    signal.setitimer(signal.ITIMER_REAL, job["wall_s"] + _GRACE_S)
    if sys.platform == "linux":
        _enter_namespaces(folder, job["file_bytes"])
    _limit(job)
    _refuse_what_asks_no_hook()
    sys.addaudithook(_guard(os.path.realpath(folder)))
    module = types.ModuleType("program")  # dataclasses and pickle look their module up by its name
    sys.modules["program"] = module
    exec(compile(program, "<program>", "exec"), module.__dict__)
    os.write(report_to, word)
    os._exit(0)  # not even what the program has put off until the end runs after the report


def _limit(job: dict[str, Any]) -> None:
    limits = {
        resource.RLIMIT_CPU: job["cpu_s"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_FSIZE: job["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        # macOS refuses one of memory
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))


def _guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """A hook that refuses what reaches out of the process or the folder."""

    def inside(path: Any) -> bool:
        if isinstance(path, int):  # a file that is open already
            return True
        place = os.path.realpath(os.fsdecode(path))
        return place == os.devnull or place.startswith(folder + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITES) if flags else bool(set(mode or "") & set("wax+"))
            # A path may start from an open folder, which this event does not tell: folders outside
            # are not opened at all, the working folder stays, and no such path climbs.
            climbs = not isinstance(path, int) and os.pardir in os.fsdecode(path).split(os.sep)
            if writes and (climbs or not inside(path)):
                raise PermissionError(f"{path} is outside the program's folder")
            if os.path.isdir(path) and os.path.realpath(path) != folder and not inside(path):
                raise PermissionError(f"the folder {path} is not to be opened")
        elif event.startswith(_CHANGES_PATHS):
            paths = [a for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            for open_folder in [
                arguments[i] for i in _FOLDERS.get(event, ()) if arguments[i] != -1
            ]:
                place = _place_of(open_folder)
                paths += [os.path.join(place, os.fsdecode(path)) for path in paths]
            if not all(map(inside, paths)):
                raise PermissionError(f"{event} outside the program's folder")
        elif event.startswith(_REFUSED) or (event == "import" and arguments[0] in _NOT_IMPORTED):
            raise PermissionError(f"{event} is not allowed")

    return hook


def _place_of(open_folder: int) -> str:
    """Where a folder lies, of which only the descriptor is known."""
    if sys.platform == "darwin":
        import fcntl

        get_path = 50  # F_GETPATH of <fcntl.h>
        return os.fsdecode(fcntl.fcntl(open_folder, get_path, bytes(1024)).rstrip(b"\0"))
    return os.path.realpath(f"/proc/self/fd/{open_folder}")


def _refuse_what_asks_no_hook() -> None:
    """What `multiprocessing` starts processes with before Python 3.14, named pipes and devices, and what
    reaches other processes."""
    import _posixsubprocess

    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError("this is not allowed")

    _posixsubprocess.fork_exec = refuse
    taken = ("mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "setpriority")
    for module in (os, signal, sys.modules["posix"], sys.modules["_signal"]):
        for name in taken:
            if hasattr(module, name):
                setattr(module, name, refuse)


def _enter_namespaces(folder: str, file_bytes: int) -> None:
    """Cut off network, other processes and file systems, as far as the kernel lets this user."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK) != 0:
        return
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    # The first child of a new process namespace is its init: all others die with it.
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        os._exit(0)
    libc.prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    libc.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None)
    read_only = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    libc.syscall(_MOUNT_SETATTR, _CURRENT_FOLDER, b"/", _AT_RECURSIVE, read_only, 32)
    options = f"size={file_bytes}".encode()
    libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NO_SETUID | _NO_DEVICES, options)
    os.chdir(folder)
    # In its own namespace it could mount all that again.
    none = (ctypes.c_uint32 * 6)()
    kept = libc.capset((ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), none)
    if kept or libc.prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0):
        os._exit(1)


if __name__ == "__main__":
    main()
