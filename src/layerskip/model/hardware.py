"""What this machine is, as far as measured costs depend on it."""

import contextlib
import functools
import hashlib
import platform
import subprocess
import sys
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")


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
