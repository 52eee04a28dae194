"""Compiles `kernels.cpp` once for each machine, loads the library, and chooses its number of threads."""

import contextlib
import ctypes
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
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import torch

from layerskip.fileio import flush
from layerskip.model.hardware import cpu_instructions
from layerskip.paths import cache_folder

_SOURCE = Path(__file__).with_name("kernels.cpp")
_SOURCES = _SOURCE, *sorted(_SOURCE.parent.glob("*.h"))
# These follow the arguments in CXX. Some compilers turn fast-math on by default, and turning it off may
# allow contraction again, which is therefore forbidden after it.
_FLAGS = ("-O2", "-fno-fast-math", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC")
# All instructions of this CPU. GCC on some ARMs ignores -march=native, some of Apple's compilers refuse
# it.
_NATIVE = "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"
_APPLE = "-mcpu=apple-m1" if platform.machine() == "arm64" else _NATIVE


class NoCompilerError(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def prepare(announce: Callable[[str], None] = lambda text: None) -> None:
    """Compile the kernels unless they are in the cache; that takes some seconds.

    Args:
        announce: called with a line of text before a compilation begins.

    Raises:
        NoCompilerError: there is no C++ compiler with OpenMP, it fails, or its library cannot be loaded.
    """
    library_file = target()
    with contextlib.suppress(OSError):  # not there, truncated, or for other system libraries
        _load(library_file)
        return
    announce("compiling kernels for this machine (once)")
    _compile(library_file)
    try:
        _load(library_file)
    except OSError as error:
        raise NoCompilerError(f"the compiled kernels cannot be loaded: {error}") from error


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels; raises what `prepare` raises."""
    prepare()
    disable_threads_after_fork()
    kernels = _load(target())
    global processors
    processors = kernels.layerskip_processors
    return kernels


@functools.cache
def _compiler() -> tuple[str, ...]:
    """Return the compiler and the arguments that it needs."""
    if os.name == "nt":
        raise NoCompilerError("on Windows the kernels are not compiled (under WSL they are)")
    try:
        configured = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise NoCompilerError(f"CXX is no command: {error}") from error
    clang = shutil.which("clang++") if sys.platform == "darwin" else None
    if configured and not (clang and [shutil.which(word) for word in configured] == [clang]):
        return (*configured, "-fopenmp", _APPLE)
    if sys.platform == "darwin":  # where g++ is clang++ too
        headers = Path(torch.__file__).parent / "include"
        if clang is None or not (headers / "omp.h").is_file():
            raise NoCompilerError(
                "there is no clang++ (xcode-select --install), or no omp.h in PyTorch; name another"
                " compiler with OpenMP in CXX, such as g++-15"
            )
        # PyTorch's OpenMP, which is in the process already, resolves the undefined symbols.
        openmp = ("-Xpreprocessor", "-fopenmp", "-isystem", str(headers))
        return (clang, *openmp, "-undefined", "dynamic_lookup", _APPLE)
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NoCompilerError("there is no C++ compiler (g++ or clang++)")
    return (compiler, "-fopenmp", _NATIVE)


@functools.cache
def target() -> Path:
    """Return the library's file, named after everything that it depends on."""
    compiler = _compiler()
    key = "\0".join((*compiler, *_FLAGS, sys.platform, platform.machine(), cpu_instructions()))
    with contextlib.suppress(OSError):  # instead of the compiler's version, which takes a process
        program = Path(shutil.which(compiler[0]) or compiler[0]).resolve()
        key += f"\0{program}\0{program.stat().st_size}\0{program.stat().st_mtime_ns}"
    sources = b"".join(file.read_bytes() for file in _SOURCES)
    name = hashlib.sha256(sources + key.encode()).hexdigest()[:16]
    try:
        return cache_folder() / "kernels" / f"{name}.so"
    except OSError as error:
        raise NoCompilerError(str(error)) from error


def _compile(library_file: Path) -> None:
    try:
        library_file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library_file.parent) as folder:
            output = Path(folder) / library_file.name
            command = [*_compiler(), *_FLAGS, str(_SOURCE), "-o", str(output)]
            try:
                process = subprocess.run(
                    command, capture_output=True, text=True, errors="replace", check=False
                )
            except OSError as error:
                raise NoCompilerError(f"{command[0]} cannot be run: {error.strerror}") from error
            if process.returncode:
                lines = process.stderr.strip().splitlines() or ["no message"]
                reason = next((line for line in lines if "error:" in line), lines[0])
                raise NoCompilerError(f"{command[0]} refuses: {reason}")
            flush(output)
            output.replace(library_file)
    except OSError as error:
        raise NoCompilerError(f"the kernels cannot be written: {error}") from error


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions; OSError if it cannot be loaded."""
    kernels = ctypes.CDLL(str(path))
    ptr, i64, f32, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    matrices = (ptr, i64)  # and how many
    arguments = {
        "run": (
            *(ptr, ptr, ptr, ptr),  # model, hidden, out, lengths
            *(i64, i64, i64, i64),  # batch, positions, start, stop
            *(ptr, i64, ptr, i32),  # slots, capacity, rotary tables, threads
        ),
        "run_rows": (
            *(ptr, ptr, ptr),  # model, hidden, out
            *(ptr, i64),  # sequences, and how many
            *(i64, i64, i32),  # start, stop, threads
        ),
        "product": (
            *(ptr, ptr, f32, ptr),  # matrix, norm, eps, x
            *(i64, ptr, i32),  # rows, out, threads
        ),
        "choose": (
            *(*matrices, ptr, f32, ptr),  # norm, eps, x
            *(i64, ptr, ptr, i32),  # rows, tokens, probabilities, threads
        ),
        "step": (
            *(ptr, ptr, ptr),  # model, embedding, tokens
            *(ptr, ptr, ptr),  # hidden, out, lengths
            *(i64, i64, i64, i64),  # batch, positions, start, stop
            *(ptr, i64, ptr),  # slots, capacity, rotary tables
            *(i64, *matrices),  # positions without logits
            *(ptr, ptr, ptr, i32),  # norm, tokens, probabilities, threads
        ),
        "draft": (
            *(ptr, ptr, ptr),  # model, embedding, tokens
            *(ptr, f32, ptr, ptr),  # projection, eps, embedded, previous
            *(ptr, ptr, i64, i64, i64),  # hidden, out, length, positions, layers
            *(ptr, i64, ptr),  # slots, capacity, rotary tables
            *(*matrices, ptr, ptr),  # norm, token ids
            *(ptr, ptr, ptr, i32),  # rule, tokens, probabilities, threads
        ),
        "rows": (ptr, ptr, i64, ptr),  # matrix, indices, how many, out
        "pack": (
            *(ptr, i32, ptr, i64),  # format, bits, blocks, rows
            *(i64, ptr, i32),  # inputs, packed, threads
        ),
        "processors": (),
    }
    results = {"rows": i32, "pack": None, "processors": i32}
    for name, types in arguments.items():
        function = getattr(kernels, f"layerskip_{name}")
        function.argtypes, function.restype = types, results.get(name, _check)
    return kernels


def _check(status: int) -> None:
    if status == 2:
        raise IndexError("a token is outside of the vocabulary")
    if status:
        raise MemoryError("there is no memory for so many positions at once")


# --- threads

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_is_forked = False
# The processors that this process may run on, as taskset and job schedulers restrict them. `library`
# replaces this by a function of the kernels, because OpenMP may have bound the calling thread to one.
processors: Callable[[], int] = lambda: os.cpu_count() or 1  # noqa: E731


def num_threads_to_use(tiles: int | None = None) -> int:
    """Return PyTorch's number of threads, limited by processors, container quota and work.

    All threads wait for each other several times a layer: one that has no processor delays all.

    Args:
        tiles: of the narrowest product, each of which one thread computes; None = many.
    """
    n_threads = 1 if _is_forked else min(torch.get_num_threads(), processors(), _quota())
    return n_threads if tiles is None else max(1, min(n_threads, tiles))


def num_threads_of(kernels: str) -> int:
    """Return the threads of a forward pass on a CPU: the compiled kernels', or PyTorch's."""
    return num_threads_to_use() if kernels == "compiled" else torch.get_num_threads()


def run_single_threaded() -> None:
    """Use one thread from now on: a forked child does not have the threads of its parent."""
    global _is_forked
    _is_forked = True
    torch.set_num_threads(1)


@functools.cache
def disable_threads_after_fork() -> None:
    """Let children that are forked from now on run single-threaded."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=run_single_threaded)


@functools.cache
def _quota() -> int:
    """Return the processors that control groups (version 1 or 2) allow, rounded up."""
    groups = {"/"}
    with contextlib.suppress(OSError, ValueError):
        for line in _OWN_CGROUPS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "cpu" in controllers.split(","):
                groups |= {path, *map(str, PurePosixPath(path).parents)}
    quota = math.inf
    for group in groups:
        v2, v1 = (root / group.lstrip("/") for root in (_CGROUPS, _CGROUPS / "cpu"))
        for files in ([v2 / "cpu.max"], [v1 / "cpu.cfs_quota_us", v1 / "cpu.cfs_period_us"]):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                limit, period = " ".join(file.read_text() for file in files).split()
                if int(limit) > 0:  # version 1 has -1 for no limit
                    quota = min(quota, int(limit) / int(period))
    return math.ceil(min(quota, 1 << 16))
