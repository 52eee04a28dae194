"""Hardware, versions, threads and precision that measured figures depend on; memory and bandwidth."""

import contextlib
import datetime
import functools
import importlib.metadata
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

import layerskip
from layerskip.decoding import DecodingConfig, Step
from layerskip.model import Decoder, native
from layerskip.model.hardware import cpu_flags, cpu_model, cpu_name, peak_memory_bytes
from layerskip.model.native.packed import in_large_pages
from layerskip.model.step_timing import device_clock

Scope = Literal["row", "process", "unknown"]
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Peak memory since `reset`: allocations on a GPU, resident memory of the process on a CPU.

    Attributes:
        scope: "row" where the high-water mark can be reset (CUDA, Linux); "process" where it only rises,
            so that it does not compare rows; "unknown" where the system does not report it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.scope: Scope = "row"
        if device.type != "cuda" and not self._reset_mark():
            self.scope = "process" if peak_memory_bytes(device) else "unknown"

    def reset(self) -> None:
        """Reset the high-water mark, where that is possible."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.scope == "row":
            self._reset_mark()

    def read(self) -> int | None:
        """Return the bytes; None where the system does not report them."""
        return peak_memory_bytes(self._device) or None

    @staticmethod
    def _reset_mark() -> bool:
        with contextlib.suppress(OSError):
            if "VmHWM" in _STATUS.read_text():
                _CLEAR.write_text("5")  # proc(5): sets the high-water mark to what is resident now
                return True
        return False


def read_bandwidth(device: torch.device, *, n_bytes: int | None = None, passes: int = 5) -> float:
    """Measure the bytes per second at which this machine reads memory, beyond what its caches hold.

    The median of several sums over `n_bytes`, with the threads that PyTorch uses now.
    """
    if n_bytes is None:
        # On a GPU more, so that launching the kernel takes a negligible part of the time.
        n_bytes = 2**30
        if device.type == "cuda":
            n_bytes = min(2**32, torch.cuda.mem_get_info(device)[0] // 2)
    shape, dtype = (n_bytes // 4,), torch.float32
    if device.type == "cpu":  # the weights are in large pages too
        memory = in_large_pages(shape, dtype).fill_(1)
    else:
        memory = torch.ones(shape, dtype=dtype, device=device)
    now = device_clock(device)
    memory.sum()
    times = []
    for _ in range(passes):
        start = now()
        memory.sum()
        times.append(now() - start)
    del memory
    if device.type == "cuda":  # PyTorch would keep it from other processes, such as baselines
        torch.cuda.empty_cache()
    return n_bytes / statistics.median(times)


def weight_bytes_read(decoder: Decoder, steps: Iterable[Step], config: DecodingConfig) -> int:
    """Return the bytes of weights that some steps had to read, without keys and values.

    A round whose n tokens were drafted by the early exit runs the first E layers n + 1 times (the last
    drafted token passes them too), the draft's head n times and once more for a discarded token, and the
    other layers and the head once to verify. Tokens drafted beyond the end of the answer count.
    Look-ups read no weights.

    Args:
        decoder: the model.
        steps: passes of decoding, without the prompt's own.
        config: resolved.
    """
    head, n_layers = decoder.head.weight_bytes, len(decoder.layers)
    layer = (
        decoder.weight_bytes - head
    ) // n_layers  # mean: some layers of a mixture have no experts
    share = 1.0
    if isinstance(config.draft_vocabulary, tuple):
        share = min(1.0, len(config.draft_vocabulary) / decoder.architecture.vocab_size)
    first = config.exit_layer or n_layers
    rest = config.num_layers_to_run(n_layers) - first
    total = 0
    for step in steps:
        scored = step.from_exit + step.discarded
        total += ((step.from_exit + 1) * first + rest) * layer + round(scored * head * share) + head
    return total


# Parts of a checkout that figures depend on. Other files, such as results, may differ.
_CODE = ("src", "benchmarks/*.py", "benchmarks/paper/*.py", "examples")


def environment(
    *,
    dtype: torch.dtype,
    weights: str = "16bit",
    device: torch.device | str = "cpu",
    kernels: str = "pytorch",
    packages: Iterable[str] = ("transformers",),
) -> dict[str, Any]:
    """Describe this machine and process, for the head of a result.

    Args:
        dtype: of hidden states and the cache.
        weights: a key of `quantize.WEIGHTS`.
        device: of the model.
        kernels: see `Decoder.kernels`.
        packages: installed distributions whose versions matter beside PyTorch's.
    """
    torch_device = torch.device(device)
    revision, model = commit(), cpu_model()
    return {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        **({"cpu_model": model} if model else {}),
        "cpu_flags": cpu_flags(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": _usable_cpus(),
        "memory_bytes": _memory_bytes(),
        "device": torch.cuda.get_device_name(torch_device)
        if torch_device.type == "cuda"
        else torch_device.type,
        "threads": native.num_threads_of(kernels),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "kernels": kernels,
        "python": platform.python_version(),
        "layerskip": layerskip.__version__,
        **({"commit": revision} if revision else {}),
        "torch": torch.__version__,
        **({"cuda": torch.version.cuda} if torch_device.type == "cuda" else {}),
        **{package: _version(package) for package in packages},
    }


def environment_of(decoder: Decoder, packages: Iterable[str] = ("transformers",)) -> dict[str, Any]:
    """Return the `environment` of a decoder."""
    return environment(
        dtype=decoder.dtype,
        weights=decoder.weights,
        device=decoder.device,
        kernels=decoder.kernels,
        packages=packages,
    )


@functools.cache
def commit() -> str:
    """Return the commit of layerskip's own checkout, with a "+" where its code was changed; else "".

    An installed layerskip has none, even where a repository happens to be around it.
    """
    source = Path(layerskip.__file__).resolve().parents[1]
    root = source.parent
    if source.name != "src" or not (root / ".git").exists() or not _is_ours(root):
        return ""
    # GIT_DIR is set in a hook, for example, and names another repository.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=root, env=env, capture_output=True, text=True, check=False
        )

    try:
        head = git("rev-parse", "--short", "HEAD").stdout.strip()
        changed = head and git("diff", "--quiet", "HEAD", "--", *_CODE).returncode
    except OSError:  # there is no git
        return ""
    return f"{head}+" if changed else head


def _is_ours(root: Path) -> bool:
    try:
        return b'name = "layerskip"' in (root / "pyproject.toml").read_bytes()
    except OSError:
        return False


def _usable_cpus() -> int | None:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        return os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
