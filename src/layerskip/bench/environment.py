"""What measured figures depend on: hardware, versions, threads, precision."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import layerskip
from layerskip.model import Decoder, native
from layerskip.model.machine import cpu_model, cpu_name

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
        "threads": native.threads_of(kernels),
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
