"""What this machine is, as far as measured costs depend on it."""

import contextlib
import ctypes
import functools
import hashlib
import platform
import subprocess
import sys
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
# Options of glibc's mallopt (malloc.h).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


@functools.cache
def cpu_name() -> str:
    """The processor's name, as far as the system tells."""
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        with contextlib.suppress(OSError):
            return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    # All that Linux says of an ARM.
    maker, part = _cpu_line("CPU implementer"), _cpu_line("CPU part")
    arm = f"ARM {maker} {part}" if maker else ""
    return _cpu_line("model name") or arm or platform.processor() or "unknown"


def cpu_model() -> str:
    """Family, model and stepping of an x86 processor, as far as Linux tells; "" where it does not.

    A name such as "AMD EPYC" alone stands for Zen 3, 4 and 5.
    """
    fields = {"family": "cpu family", "model": "model", "stepping": "stepping"}
    found = {word: _cpu_line(field) for word, field in fields.items()}
    if not found["family"]:  # POWER has a line "model" of its own
        return ""
    return ", ".join(f"{word} {number}" for word, number in found.items() if number.isdecimal())


def cpu_instructions() -> str:
    """What the processor can do, in the system's words; its name where it does not tell.

    What is compiled for one processor may lie in a cache folder that another one shares.
    """
    return _cpu_line("flags") or _cpu_line("Features") or cpu_name()


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch has products in bfloat16 that a machine of this kind is made for.

    On a CPU without AVX-512 they take tens of times as long as those in float32.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def leave_out_cudnn_attention(device: torch.device) -> None:
    """Have attention on CUDA use PyTorch's other kernels, in all of this process.

    From some versions on cuDNN's come first on an H100. They are planned anew for every shape, which
    takes tens of milliseconds, and nearly every pass over a growing context has another shape; so have
    layers that some rows of a batch skip.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


@functools.cache
def machine(device: torch.device) -> str:
    """A name for a GPU, or for a processor and its instructions: machines with one name cost alike."""
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
    """Highest memory so far: allocated on a GPU, resident in the process on a CPU; 0 = unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux, where ru_maxrss begins with the peak of who started this process.
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
    """Have this process reuse the large blocks that it frees, instead of returning them.

    glibc gives each large block back to the system and takes it anew, whose pages then have to be
    zeroed: on a CPU that was half the time of a training step. Other C libraries are left as they
    are.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, _NEVER)
