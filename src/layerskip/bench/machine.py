"""What measured figures depend on: hardware, versions, threads, precision."""

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
from layerskip.decoding import Step
from layerskip.model import Decoder, native
from layerskip.model.hardware import cpu_model, cpu_name, peak_memory_bytes
from layerskip.model.native.packed import in_large_pages
from layerskip.model.step_timing import device_clock

Scope = Literal["row", "process", "unknown"]
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """The highest memory since `reset`.

    On a GPU it is what PyTorch had allocated there. On a CPU it is what the process had resident, the
    weights and all other systems' leftovers in the process included.

    Attributes:
        scope: "row" where the mark can be set back (CUDA, Linux); "process" where it only ever rises,
            so that it says nothing about one row; "unknown" where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.scope: Scope = "row"
        if device.type != "cuda" and not self._set_back():
            self.scope = "process" if peak_memory_bytes(device) else "unknown"

    def reset(self) -> None:
        """Forget the peak so far, where that is possible."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.scope == "row":
            self._set_back()

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        return peak_memory_bytes(self._device) or None

    @staticmethod
    def _set_back() -> bool:
        with contextlib.suppress(OSError):
            if "VmHWM" in _STATUS.read_text():
                _CLEAR.write_text("5")  # proc(5): sets the high-water mark to what is resident now
                return True
        return False


def read_bandwidth(device: torch.device, *, n_bytes: int | None = None, passes: int = 5) -> float:
    """Bytes per second at which this machine reads memory: a sum over much more than its caches hold.

    The median of several passes, with the threads that PyTorch uses at this moment. The memory is given
    back afterwards.
    """
    if n_bytes is None:
        # Of a GPU enough for its launch and the waiting not to count, where there is so much.
        n_bytes = 2**30
        if device.type == "cuda":
            n_bytes = min(2**32, torch.cuda.mem_get_info(device)[0] // 2)
    shape, dtype = (n_bytes // 4,), torch.float32
    if device.type == "cpu":  # as the weights lie
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
    if device.type == "cuda":  # PyTorch would keep it from other processes, such as peers
        torch.cuda.empty_cache()
    return n_bytes / statistics.median(times)


def weight_bytes_read(
    decoder: Decoder,
    steps: Iterable[Step],
    *,
    exit_layer: int | None,
    drafting: bool,
    draft_vocabulary: int | None = None,
) -> int:
    """Bytes of weights that these steps had to read, keys and values left out.

    A round whose n tokens were drafted by an early exit runs the first E layers n + 1 times (the last
    drafted token has to pass them too), the head n times for the draft and once more for a token that
    was left out as unsure, and the other layers and the head once to verify. What was drafted beyond the
    end of the answer was read for, too. Where n-grams were the draft, every layer and the head are read
    once; where they follow a draft they read nothing.

    Args:
        decoder: the model.
        steps: passes of decoding, without the prompt's own.
        exit_layer: layers run for one token; None means all.
        drafting: whether the steps are rounds of self-speculative decoding.
        draft_vocabulary: tokens that the early exit may draft; None means all.
    """
    head = decoder.head.weight_bytes
    # On average: some layers of a mixture may have none.
    layer = (decoder.weight_bytes - head) // len(decoder.layers)
    exit_at = len(decoder.layers) if exit_layer is None else exit_layer
    size = decoder.architecture.vocab_size
    share = min(draft_vocabulary or size, size) / size
    total = 0
    for step in steps:
        scored = step.from_exit + step.refused
        total += (step.from_exit + 1) * exit_at * layer + round(scored * head * share) + head
        if drafting:
            total += (len(decoder.layers) - exit_at) * layer
    return total


# In a checkout: what decides on figures. Its other files, such as results, may differ.
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
        weights: how weights are kept.
        device: where the model is.
        kernels: what runs the layers, see `Decoder.kernels`.
        packages: installed distributions whose versions matter beside PyTorch's.
    """
    place = torch.device(device)
    made_from, model = commit(), cpu_model()
    return {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        **({"cpu_model": model} if model else {}),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": _usable_cpus(),
        "memory_bytes": _memory_bytes(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "threads": native.num_threads_of(kernels),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "kernels": kernels,
        "python": platform.python_version(),
        "layerskip": layerskip.__version__,
        **({"commit": made_from} if made_from else {}),
        "torch": torch.__version__,
        **({"cuda": torch.version.cuda} if place.type == "cuda" else {}),
        **{package: _version(package) for package in packages},
    }


def environment_of(decoder: Decoder, packages: Iterable[str] = ("transformers",)) -> dict[str, Any]:
    """`environment` of what runs on a decoder."""
    return environment(
        dtype=decoder.dtype,
        weights=decoder.weights,
        device=decoder.device,
        kernels=decoder.kernels,
        packages=packages,
    )


@functools.cache
def commit() -> str:
    """The commit of layerskip's own checkout, with a "+" where its code differs from it; else "".

    An installed layerskip has none: a repository that happens to be around it says nothing of it.
    """
    source = Path(layerskip.__file__).resolve().parents[1]
    root = source.parent
    if source.name != "src" or not (root / ".git").exists() or not _is_ours(root):
        return ""
    # Such as GIT_DIR in a hook, which would have another repository answer.
    others = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=root, env=others, capture_output=True, text=True, check=False
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
