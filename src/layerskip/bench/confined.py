"""Started by `sandbox.py` as a program: gives up its rights, then runs what is in job.json.

Four layers, each of which holds where another does not:

1. limits of the process (processor time, memory, size of files, open files): Linux, macOS but for
   memory;
2. an audit hook, which Python asks before it opens a file for writing, starts a process, or touches
   a socket: everywhere, but only what goes through Python;
3. what the kernel refuses a process that asks for it: sockets, other programs and processes
   (seccomp), and files to be written outside the folder (Landlock, Linux 5.13): Linux, on x86-64
   and ARM64;
4. namespaces of its own: no network, no other process in sight, all file systems read-only and a
   temporary one in place of the working folder: Linux, where an ordinary user may have them.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable
from typing import Any

by_kernel: set[str] = set()  # what the kernel has agreed to: "namespaces", "calls", "files"

# Linux, from its headers <sched.h>, <sys/mount.h>, <sys/prctl.h>, <asm/unistd.h>.
_NEW_MOUNTS, _NEW_IPC, _NEW_USER = 0x00020000, 0x08000000, 0x10000000
_NEW_PIDS, _NEW_NETWORK = 0x20000000, 0x40000000
_PRIVATE, _RECURSIVE, _NO_SETUID, _NO_DEVICES, _NO_PROGRAMS = 1 << 18, 1 << 14, 2, 4, 8
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY, _CURRENT_FOLDER = 442, 0x8000, 1, -100
_KILL_WITH_PARENT, _NO_NEW_RIGHTS, _SET_SECCOMP, _FILTER = 1, 38, 22, 2
_CAPABILITIES_VERSION = 0x20080522
_GRACE_S = 5.0
_LIBC = ctypes.CDLL(None)

# Calls that are refused, by their numbers on x86-64 and ARM64 (<asm/unistd.h>; -: it has no such).
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_CALLS = """
socket 41 198 | socketpair 53 199 | fork 57 - | vfork 58 - | execve 59 221 | execveat 322 281 |
ptrace 101 117 | process_vm_readv 310 270 | process_vm_writev 311 271 | tkill 200 130 |
rt_sigqueueinfo 129 138 | rt_tgsigqueueinfo 297 240 | pidfd_send_signal 424 424 |
pidfd_open 434 434 | pidfd_getfd 438 438 | setpriority 141 140 | ioprio_set 251 30 |
sched_setparam 142 118 | sched_setscheduler 144 119 | sched_setaffinity 203 122 |
sched_setattr 314 274 | chmod 90 - | fchmod 91 52 | fchmodat 268 53 | fchmodat2 452 452 |
shmget 29 194 | semget 64 190 | msgget 68 186 | mq_open 240 180 | add_key 248 217 |
request_key 249 218 | keyctl 250 219 | unshare 272 97 | setns 308 268 | perf_event_open 298 241 |
bpf 321 280 | userfaultfd 323 282 | io_uring_setup 425 425 | setxattr 188 5 | lsetxattr 189 6 |
fsetxattr 190 7 | removexattr 197 14 | lremovexattr 198 15 | fremovexattr 199 16 |
setxattrat 463 463 | removexattrat 466 466 | chown 92 - | fchown 93 55 | lchown 94 - |
fchownat 260 54 | memfd_create 319 279
"""
# These may name the process itself; "clone" may make a thread, and "clone3" cannot be looked into.
_KILL, _TGKILL, _PRLIMIT, _CLONE, _CLONE3 = (62, 129), (234, 131), (302, 261), (56, 220), (435, 435)
# Who gets a signal when a file can be read, and which: any process, and one that ends it.
_FCNTL, _IOCTL, _OWNERS = (72, 25), (16, 29), ((8, 10, 15), (0x8901, 0x8902))
_LOAD, _EQUAL, _AT_LEAST, _HAS_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # <linux/bpf_common.h>
_ALLOW, _KILL_PROCESS, _NOT_PERMITTED, _NOT_THERE = 0x7FFF0000, 0x80000000, 0x50001, 0x50026
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24  # in struct seccomp_data

# <linux/landlock.h>
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_WRITE, _REMOVE, _MAKE, _MOVE, _TRUNCATE = 1 << 1, 3 << 4, 127 << 6, 1 << 13, 1 << 14
_DEVICES, _SIGNALS_AND_SOCKETS = 1 << 15, 3  # settings of terminals; other processes

# Events of sys.audit: https://docs.python.org/3/library/audit_events.html
_REFUSED = (
    *("_posixsubprocess.", "cpython.PyInterpreterState_New", "ctypes.", "os.chdir", "os.chflags"),
    *("os.chmod", "os.chown", "os.exec", "os.fork", "os.kill", "os.posix_spawn", "os.removexattr"),
    *(
        "os.setxattr",
        "os.system",
        "resource.prlimit",
        "socket.",
        "sqlite3.",
        "subprocess.",
        "syslog.",
    ),
    *(["fcntl."] if sys.platform == "linux" else []),  # macOS has `_place_of` by it
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
# They open files unasked, or would have again what `_refuse_what_asks_no_hook` takes away.
_NOT_IMPORTED = ("_dbm", "_gdbm", "_posixshmem", "_posixsubprocess", "posix", "readline")
_DEVICES_TO_READ = (os.devnull, "/dev/zero", "/dev/random", "/dev/urandom")
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
        _give_up_privileges()
        _ask_the_kernel(folder)
    _limit(job)
    _refuse_what_asks_no_hook()
    # The C library, whose functions ask no hook once they were looked up.
    del globals()["_LIBC"]
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
            place = "" if isinstance(path, int) else os.path.realpath(os.fsdecode(path))
            if place.startswith("/dev/") and place not in _DEVICES_TO_READ:
                raise PermissionError(f"{path} is not to be read")  # such as terminals
            if os.path.isdir(path) and os.path.realpath(path) != folder and not inside(path):
                raise PermissionError(f"the folder {path} is not to be opened")
        elif event.startswith(_CHANGES_PATHS):
            paths = [a for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            for open_folder in [
                arguments[i] for i in _FOLDERS.get(event, ()) if arguments[i] != -1
            ]:
                place = _place_of(open_folder)
                paths += [os.path.join(place, os.fsdecode(path)) for path in paths]
            if event == "os.utime" and isinstance(arguments[0], int):
                paths.append(_place_of(arguments[0]))
            if not all(map(inside, paths)):
                raise PermissionError(f"{event} outside the program's folder")
        elif event.startswith(_REFUSED) or (event == "import" and arguments[0] in _NOT_IMPORTED):
            kind = ImportError if event == "import" else PermissionError  # some go on without
            raise kind(f"{event} is not allowed")

    return hook


def _place_of(open_folder: int) -> str:
    """Where a folder lies, of which only the descriptor is known."""
    if sys.platform == "darwin":
        import fcntl

        get_path = 50  # F_GETPATH of <fcntl.h>
        return os.fsdecode(fcntl.fcntl(open_folder, get_path, bytes(1024)).rstrip(b"\0"))
    return os.path.realpath(f"/proc/self/fd/{open_folder}")


def _refuse_what_asks_no_hook() -> None:
    """What `multiprocessing` starts processes with before Python 3.14, named pipes and devices, memory
    that is not counted, and what reaches other processes."""
    import _posixsubprocess

    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError("this is not allowed")

    _posixsubprocess.fork_exec = refuse
    taken = ["memfd_create", "mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "setpriority"]
    taken += ["sched_setaffinity", "sched_setparam", "sched_setscheduler"]
    for module in (os, signal, sys.modules["posix"], sys.modules["_signal"]):
        for name in taken:
            if hasattr(module, name):
                setattr(module, name, refuse)


def _enter_namespaces(folder: str, file_bytes: int) -> None:
    """Cut off network, other processes and file systems, as far as the kernel lets this user."""
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_USER | _NEW_MOUNTS | _NEW_IPC | _NEW_PIDS | _NEW_NETWORK) != 0:
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
    _LIBC.prctl(_KILL_WITH_PARENT, signal.SIGKILL)
    _LIBC.mount(None, b"/", None, _PRIVATE | _RECURSIVE, None)
    read_only = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    if _LIBC.syscall(_MOUNT_SETATTR, _CURRENT_FOLDER, b"/", _AT_RECURSIVE, read_only, 32) == 0:
        by_kernel.add("namespaces")
    options = f"size={file_bytes}".encode()
    _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NO_SETUID | _NO_DEVICES, options)
    # Not everywhere may it be mounted anew; the old one then still names other processes.
    _LIBC.mount(
        b"proc", b"/proc", b"proc", _READ_ONLY | _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS, None
    )
    _LIBC.mount(b"tmpfs", b"/dev/pts", b"tmpfs", _READ_ONLY | _NO_DEVICES, None)  # no terminals
    os.chdir(folder)


def _give_up_privileges() -> None:
    """Root of its own namespace could mount everything again, and root of a container some of it."""
    none = (ctypes.c_uint32 * 6)()
    kept = _LIBC.capset((ctypes.c_uint32 * 2)(_CAPABILITIES_VERSION, 0), none)
    if kept or _LIBC.prctl(_NO_NEW_RIGHTS, 1, 0, 0, 0):
        os._exit(1)


def _ask_the_kernel(folder: str) -> None:
    """Have Landlock and seccomp refuse what they can, where the kernel has them."""
    if platform.machine() in _ARCHITECTURES and sys.maxsize > 1 << 32:
        if _only_writes_into(folder):
            by_kernel.add("files")
        filters = _refused_calls(*_ARCHITECTURES[platform.machine()])
        code = ctypes.create_string_buffer(b"".join(filters))
        program = struct.pack("HP", len(filters), ctypes.addressof(code))  # struct sock_fprog
        if _LIBC.prctl(_SET_SECCOMP, _FILTER, program, 0, 0) == 0:
            by_kernel.add("calls")


def _only_writes_into(folder: str) -> bool:
    version = _LIBC.syscall(_CREATE_RULESET, None, 0, 1)
    if version < 1:
        return False
    on_files = _WRITE | (_TRUNCATE if version >= 3 else 0)
    writes = on_files | _REMOVE | _MAKE | (_MOVE if version >= 2 else 0)
    writes |= _DEVICES if version >= 5 else 0
    asked = struct.pack("QQQ", writes, 0, _SIGNALS_AND_SOCKETS)[: 24 if version >= 6 else 8]
    rules = _LIBC.syscall(_CREATE_RULESET, asked, len(asked), 0)
    for path, rights in ((folder, writes), (os.devnull, on_files)):
        place = os.open(path, os.O_PATH)
        _LIBC.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)
    done: int = _LIBC.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)
    return done == 0 and version >= 3  # before that files could still be emptied


def _refused_calls(column: int, architecture: int) -> list[bytes]:
    """A seccomp filter: instructions (operation, jump if true, jump if false, value)."""

    def instruction(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", operation, if_true, if_false, value)

    def only_with(number: int, argument: int) -> list[bytes]:
        return [
            instruction(_EQUAL, number, 0, 4),
            instruction(_LOAD, _FIRST_ARGUMENT),
            instruction(_EQUAL, argument, 1, 0),
            instruction(_RETURN, _NOT_PERMITTED),
            instruction(_LOAD, _NUMBER),
        ]

    def never_with(number: int, arguments: tuple[int, ...]) -> list[bytes]:
        refusals = [
            part
            for argument in arguments
            for part in (instruction(_EQUAL, argument, 0, 1), instruction(_RETURN, _NOT_PERMITTED))
        ]
        looks = [instruction(_LOAD, _SECOND_ARGUMENT), *refusals, instruction(_LOAD, _NUMBER)]
        return [instruction(_EQUAL, number, 0, len(looks)), *looks]

    filters = [
        instruction(_LOAD, _ARCHITECTURE),
        instruction(_EQUAL, architecture, 1, 0),
        instruction(_RETURN, _KILL_PROCESS),
        instruction(_LOAD, _NUMBER),
    ]
    if column == 0:  # x32, which has numbers of its own
        filters += [instruction(_AT_LEAST, 1 << 30, 0, 1), instruction(_RETURN, _KILL_PROCESS)]
    for line in _CALLS.split("|"):
        if (number := line.split()[1 + column]) != "-":
            filters += [
                instruction(_EQUAL, int(number), 0, 1),
                instruction(_RETURN, _NOT_PERMITTED),
            ]
    for call, argument in ((_KILL, os.getpid()), (_TGKILL, os.getpid()), (_PRLIMIT, 0)):
        filters += only_with(call[column], argument)
    for call, commands in zip((_FCNTL, _IOCTL), _OWNERS, strict=True):
        filters += never_with(call[column], commands)
    # The C library makes threads by "clone" where it is told that there is no "clone3".
    filters += [
        instruction(_EQUAL, _CLONE3[column], 0, 1),
        instruction(_RETURN, _NOT_THERE),
        instruction(_EQUAL, _CLONE[column], 0, 3),
        instruction(_LOAD, _FIRST_ARGUMENT),
        instruction(_HAS_BIT, 0x00010000, 1, 0),  # CLONE_THREAD
        instruction(_RETURN, _NOT_PERMITTED),
        instruction(_RETURN, _ALLOW),
    ]
    return filters


if __name__ == "__main__":
    main()
