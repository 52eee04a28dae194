"""Names and features of this machine's CPU or GPU, and its memory."""

import contextlib
import ctypes
import functools
import hashlib
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_VECTOR_FLAGS = (
    *("fma", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16"),  # ARM
)
# Options of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1
_PRODUCT = (1024, 768, 2048)  # rows, inputs, outputs, as of a batch in a small model
_PRODUCT_RUNS = 5


@functools.cache
def cpu_name() -> str:
    """Return the processor's name, "unknown" if the system does not report it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError):
            return subprocess.run(
                command, capture_output=True, text=True, check=False
            ).stdout.strip()
    # Linux reports no more of an ARM.
    maker, part = _cpu_line("CPU implementer"), _cpu_line("CPU part")
    arm = f"ARM {maker} {part}" if maker else ""
    return _cpu_line("model name") or arm or platform.processor() or "unknown"


def cpu_model() -> str:
    """Return family, model and stepping of an x86 processor as Linux reports them, else "".

    Zen 3, 4 and 5 may all have the name "AMD EPYC".
    """
    fields = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    numbers = {word: _cpu_line(field) for word, field in fields.items()}
    if not numbers["family"]:  # POWER has a line "model" of its own
        return ""
    return ", ".join(f"{word} {number}" for word, number in numbers.items() if number.isdecimal())


def cpu_flags() -> str:
    """Return the vector instruction sets of the processor that kernels may use, "" if not reported."""
    return " ".join(flag for flag in _VECTOR_FLAGS if flag in cpu_instructions().split())


def cpu_instructions() -> str:
    """Return the processor's feature flags, or its name if the system does not report them.

    Compiled libraries are named after them, since processors may share a cache folder.
    """
    return _cpu_line("flags") or _cpu_line("Features") or cpu_name()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return True if PyTorch is fast with bfloat16 on this device.

    On a CPU without AVX-512 a product takes tens of times as long as in float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which PyTorch multiplies large matrices fastest: bfloat16 or float32."""
    is_fast = has_fast_bfloat16(device)
    if is_fast and device.type == "cpu":  # with AVX-512, some CPUs are and some are not
        is_fast = _product_s(torch.bfloat16) < _product_s(torch.float32)
    return torch.bfloat16 if is_fast else torch.float32


@functools.cache
def _product_s(dtype: torch.dtype) -> float:
    """Return the seconds of a matrix product on the CPU, the fastest of several runs."""
    rows, inputs, outputs = _PRODUCT
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    seconds = []
    for _ in range(_PRODUCT_RUNS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def disable_cudnn_attention(device: torch.device) -> None:
    """Disable cuDNN's attention on CUDA for this process, in favour of PyTorch's other kernels.

    On an H100 recent versions of PyTorch prefer cuDNN. It plans each new shape for tens of milliseconds,
    and nearly every pass over a growing context has a new shape, as do layers that rows of a batch skip.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


@functools.cache
def machine(device: torch.device) -> str:
    """Return a name for a GPU, or for a CPU and its features: the same name means the same costs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions = hashlib.sha256(cpu_instructions().encode()).hexdigest()[:8]
    return f"{cpu_name()}, {instructions}"


@functools.cache
def _cpu_line(field: str) -> str:
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:  # macOS, Windows
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in pairs if name.strip() == field), "")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory: allocated on a GPU, resident in the process on a CPU; 0 = unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # On Linux, ru_maxrss starts with the peak of the parent process.
    with contextlib.suppress(OSError, StopIteration):
        lines = _STATUS.read_text().splitlines()
        return 1024 * int(next(x for x in lines if x.startswith("VmHWM")).split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def keep_freed_memory() -> None:
    """Let this process reuse the large blocks that it frees, instead of returning them to the system.

    glibc returns each large block and requests new ones, whose pages have to be zeroed: on a CPU that
    was half the time of a training step. Other C libraries are not changed.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
