"""What measured figures depend on: hardware, versions, threads, precision."""

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from typing import Any

import torch

import layerskip
from layerskip.model import Decoder, native
from layerskip.model.machine import cpu_name


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
    return {
        "date": datetime.date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": _usable_cpus(),
        "memory_bytes": _memory_bytes(),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "threads": native.usable() if kernels == "compiled" else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights,
        "kernels": kernels,
        "python": platform.python_version(),
        "layerskip": layerskip.__version__,
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
