"""`kernels.cpp` to a library: compiled once for each machine, with the compiler that is there."""

import contextlib
import ctypes
import errno
import functools
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import platformdirs
import torch

from layerskip.fileio import flush, replace
from layerskip.model.hardware import cpu_instructions
from layerskip.paths import cache_folder

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_is_forked = False
# Those that this process may run on, as taskset and schedulers of jobs leave them. The kernels tell once
# they are loaded: the system says which ones a thread may run on, and OpenMP may have bound it to one.
processors: Callable[[], int] = lambda: os.cpu_count() or 1  # noqa: E731


def num_threads_to_use(panels: int | None = None) -> int:
    """PyTorch's threads, but no more than a container's share of the processors, or than there is work.

    All threads wait for each other several times a layer: where one is held up, all are.

    Args:
        panels: of the narrowest product; None = enough for all.
    """
    most = 1 if _is_forked else min(torch.get_num_threads(), processors(), _quota())
    return most if panels is None else max(1, min(most, panels))


def num_threads_of(kernels: str) -> int:
    """Threads of a pass on a CPU: those of the compiled kernels, or of PyTorch."""
    return num_threads_to_use() if kernels == "compiled" else torch.get_num_threads()


def run_single_threaded() -> None:
    """In a forked child: the threads of its parent are none of its own, and cannot be started again."""
    global _is_forked
    _is_forked = True
    torch.set_num_threads(1)


@functools.cache
def disable_threads_after_fork() -> None:
    """Let children that are forked from now on work alone, without the threads of their parent."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=run_single_threaded)


@functools.cache
def _quota() -> int:
    """Processors that control groups may use at a time, rounded up; as many as you like without one."""
    limits = (share for share in _shares() if share > 0)  # version 1 says -1 for none
    return math.ceil(min(limits, default=1 << 16))


def _shares() -> Iterator[float]:
    """Time by period of the process's group and all above it, of both versions of control groups."""
    paths = {"/"}
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "" or "cpu" in kinds.split(","):
                paths |= {path, *map(str, PurePosixPath(path).parents)}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
            limit, period = (_CGROUPS / path.lstrip("/") / "cpu.max").read_text().split()
            yield int(limit) / int(period)
        folder = _CGROUPS / "cpu" / path.lstrip("/")
        with contextlib.suppress(OSError, ValueError):
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text() for name in names)
            yield int(quota) / int(period)


_SOURCE = Path(__file__).with_name("kernels.cpp")
# Behind the arguments of CXX. Some compilers have fast-math on unless they are told; switching it off
# may let them contract again, which is therefore forbidden after it.
_FLAGS = ("-O2", "-fno-fast-math", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC")
# All that this CPU has. -march=native is nothing to GCC on some ARMs, and an error to some of Apple's.
_NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
_APPLES = "-mcpu=apple-m1" if platform.machine() == "arm64" else _NATIVE


class NoCompilerError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


class _RefusedError(NoCompilerError):
    """The same, and so it will be the next time."""


# Said by compilers whom something else stopped, which may be gone the next time.
_PASSING = (
    *("terminated program", "No space left", "annot allocate memory", "out of memory"),
    *("temporarily unavailable", "Too many open files", "nput/output error", "quota exceeded"),
    *("tale file handle", "'omp.h' file not found"),  # the last is there once it is installed
)


def prepare(announce: Callable[[str], None] = lambda text: None) -> None:
    """Compile the kernels where this machine has not done so before, which takes some seconds.

    Args:
        announce: told what is going on before a compilation begins.

    Raises:
        NoCompilerError: there is no C++ compiler with OpenMP, it refuses, or what it makes cannot be
            loaded.
    """
    library_file = target()
    _check_owner(library_file)
    refused = library_file.with_suffix(".refused")
    what = "compiling kernels for this machine (once)"
    if os.path.isfile(library_file):
        try:
            _loaded(library_file)
            return
        except OSError:  # cut off, or made where other libraries are
            what = "compiling kernels again, as those there cannot be loaded"
    if os.path.isfile(refused):
        why = refused.read_text(encoding="utf-8", errors="replace")
        raise NoCompilerError(f"{why} (remove {refused} to try again)")
    announce(what)
    try:
        _compile(library_file)
        _check_owner(library_file)  # that took seconds, in which its folder may have become another
        _load_new(library_file)
    except _RefusedError as error:  # every start would take as long
        with contextlib.suppress(OSError):
            replace(refused, str(error).encode(errors="replace"))
        raise


def _load_new(library_file: Path) -> None:
    try:
        _loaded(library_file)
    except OSError as error:
        raise _RefusedError(f"the compiled kernels cannot be loaded: {error}") from error


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels; raises what `prepare` raises."""
    prepare()
    disable_threads_after_fork()
    loaded = _loaded(target())
    global processors
    processors = loaded.layerskip_processors
    return loaded


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer, whole = ctypes.c_void_p, ctypes.c_int64
    loaded.layerskip_run.argtypes = [
        *(pointer, pointer, pointer, pointer),  # model, hidden, out, lengths
        *(whole, whole, whole, whole),  # batch, positions, start, stop
        *(pointer, whole, pointer, ctypes.c_int),  # slots, capacity, turns, threads
    ]
    loaded.layerskip_product.argtypes = [
        *(pointer, pointer, ctypes.c_float, pointer),  # matrix, norm, eps, x
        *(whole, pointer, ctypes.c_int),  # rows, out, threads
    ]
    loaded.layerskip_choose.argtypes = [
        *(pointer, whole, pointer, ctypes.c_float, pointer),  # matrices, how many, norm, eps, x
        *(whole, pointer, pointer, ctypes.c_int),  # rows, chosen, probabilities, threads
    ]
    loaded.layerskip_soften.argtypes = [
        *(pointer, whole, pointer, ctypes.c_float, pointer),  # matrices, how many, norm, eps, x
        *(whole, ctypes.c_float, pointer),  # rows, temperature, out
        *(pointer, pointer, ctypes.c_int),  # blocks, whole, threads
    ]
    loaded.layerskip_draw.argtypes = [
        *(pointer, whole, pointer, pointer),  # matrices, how many, outputs, blocks
        *(ctypes.c_float, ctypes.c_float, ctypes.c_double),  # highest, temperature, share
    ]
    loaded.layerskip_draw.restype = whole
    loaded.layerskip_step.argtypes = [
        *(pointer, pointer, pointer),  # model, embedding, tokens
        *(pointer, pointer, pointer),  # hidden, out, lengths
        *(whole, whole, whole, whole),  # batch, positions, start, stop
        *(pointer, whole, pointer),  # slots, capacity, turns
        *(whole, pointer, whole),  # unscored, matrices, how many
        *(pointer, pointer),  # norm, token ids
        *(pointer, pointer, pointer),  # chosen, probabilities, shares
        *(ctypes.c_float, pointer, pointer, pointer),  # temperature, outputs, blocks, whole
        *(pointer, ctypes.c_int),  # drawn, threads
    ]
    loaded.layerskip_rows.argtypes = [pointer, pointer, whole, pointer]
    loaded.layerskip_processors.argtypes = []
    for name in ("rows", "processors"):
        getattr(loaded, f"layerskip_{name}").restype = ctypes.c_int
    for name in ("run", "product", "choose", "soften", "step"):
        getattr(loaded, f"layerskip_{name}").restype = _check
    return loaded


def _check(status: int) -> None:
    if status == 2:
        raise IndexError("a token is outside of the vocabulary")
    if status:
        raise MemoryError("there is no memory for so many positions at once")


@functools.cache
def _compiler() -> tuple[str, ...]:
    """The compiler's program, and arguments that come with it."""
    if os.name == "nt":
        raise NoCompilerError("on Windows the kernels are not compiled (under WSL they are)")
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NoCompilerError(f"CXX is no command: {error}") from error
    own = shutil.which("clang++") if sys.platform == "darwin" else None
    if named and not (own and [shutil.which(word) for word in named] == [own]):
        return (*named, "-fopenmp", _APPLES)
    if sys.platform == "darwin":  # where g++ is clang++ by another name
        compiler = own
        headers = Path(torch.__file__).parent / "include"
        if compiler is None or not (headers / "omp.h").is_file():
            raise NoCompilerError(
                "there is no clang++ (xcode-select --install), or no omp.h in PyTorch; name another"
                " compiler with OpenMP in CXX, such as g++-15"
            )
        # PyTorch's OpenMP: its library, which is in the process already, has what is left undefined.
        found = (
            "-Xpreprocessor",
            "-fopenmp",
            "-isystem",
            str(headers),
            "-undefined",
            "dynamic_lookup",
        )
        return (compiler, *found, _APPLES)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("there is no C++ compiler (g++ or clang++)")
    return (compiler, "-fopenmp", _NATIVE)


@functools.cache
def target() -> Path:
    """The compiled library's file, named after everything that it depends on."""
    compiler = _compiler()
    what = "\0".join((*compiler, *_FLAGS, sys.platform, platform.machine(), cpu_instructions()))
    with contextlib.suppress(OSError):  # its version, as far as the file tells
        program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
        what += f"\0{program}\0{program.stat().st_size}\0{program.stat().st_mtime_ns}"
    name = hashlib.sha256(_SOURCE.read_bytes() + what.encode()).hexdigest()[:16]
    return _folder() / f"{name}.so"


def _folder() -> Path:
    """Where libraries are kept: in this user's own cache, where the one named is another user's.

    Who owns a folder could exchange what lies in it between a look at it and its use.
    """
    try:
        named, own = cache_folder(), Path(platformdirs.user_cache_dir("layerskip"))
    except OSError as error:
        raise NoCompilerError(str(error)) from error
    for cache in (named, own):
        folder = cache / "kernels"
        with contextlib.suppress(OSError):
            if all(_is_trusted(path.stat()) for path in (cache, folder) if path.exists()):
                return folder
    return named / "kernels"  # which is refused


def _is_trusted(found: os.stat_result) -> bool:
    """Whether this user or root made it."""
    return os.name != "posix" or found.st_uid in (0, os.geteuid())


def _check_owner(library_file: Path) -> None:
    """Refuse a library that somebody else has made, or could have: it would run as this user.

    Where it is this user's, and a umask let others write to it, they may do so no longer, and it is
    compiled anew.

    Raises:
        NoCompilerError: it is refused; the message says which file or folder is in the way.
    """
    for path in (library_file.parent, library_file):
        try:
            found = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise NoCompilerError(f"{path} cannot be looked at ({error.strerror})") from error
        if not _is_trusted(found):
            raise NoCompilerError(
                f"{path} is of another user: set LAYERSKIP_CACHE to another folder"
            )
        if os.name != "posix" or not found.st_mode & 0o022:
            continue
        try:
            _keep_from_others(path)
            library_file.unlink(missing_ok=True)
        except OSError as error:
            raise NoCompilerError(
                f"others may write to {path}: set LAYERSKIP_CACHE to another folder"
            ) from error


def _keep_from_others(path: Path) -> None:
    """Whatever the umask is, others may not write to it; OSError where the file system cannot say so."""
    if os.name != "posix":
        return
    path.chmod(path.stat().st_mode & ~0o022)
    if path.stat().st_mode & 0o022:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(path))


def _compile(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _keep_from_others(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            command = [*_compiler(), *_FLAGS, str(_SOURCE), "-o", str(made)]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", check=False
                )
            except OSError as error:
                raise NoCompilerError(f"{command[0]} cannot be run: {error.strerror}") from error
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["no message"]
                reason = next((line for line in said if "error:" in line), said[0])
                passes = done.returncode < 0 or any(sign in done.stderr for sign in _PASSING)
                raise (NoCompilerError if passes else _RefusedError)(
                    f"{command[0]} refuses: {reason}"
                )
            _keep_from_others(made)
            flush(made)
            made.replace(target)
    except OSError as error:
        raise NoCompilerError(f"the kernels cannot be written: {error}") from error
