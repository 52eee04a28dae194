"""Where a model runs and in which dtype, from what a caller names."""

import warnings
from collections.abc import Callable

import torch

from layerskip.model import Architecture, native, torch_compile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(device: str | torch.device) -> torch.device:
    """The device of a name; raises ValueError where it is not here."""
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"the device {device!r} is unknown; use cpu or cuda") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device {device} is not available here; use cpu")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"the device {device!r} is not supported; use cpu or cuda")
    if str(place) == "cuda":  # another thread's current one is another
        return torch.device("cuda", torch.cuda.current_device())
    return place


class KernelsWarning(UserWarning):
    """PyTorch runs the layers, since the compiled kernels are not to be had."""


def prepared(
    wanted: bool | None,
    dtype: torch.dtype | None,
    device: torch.device,
    announce: Callable[[str], None],
    architecture: Architecture,
) -> bool:
    """Return True if the compiled kernels, or on a GPU `torch.compile`, are to be used and available.

    On a GPU `wanted` None means eager PyTorch, because `torch.compile` was not tested on one.
    """
    if wanted is False or torch_compile.supports(architecture, device):
        return bool(wanted)
    dtype = torch.bfloat16 if dtype is None else dtype  # which they make the default
    if not native.supports(architecture, dtype, device):
        if wanted:
            raise ValueError(
                f"the compiled kernels have no {str(dtype).removeprefix('torch.')} of"
                f" {architecture.family} models on {device.type} (docs/kernels.md);"
                " load without compile"
            )
        return False
    try:
        native.prepare(announce)
    except native.NoCompilerError as error:
        if wanted:
            raise ValueError(f"{error}; install one, or load without compile") from error
        what = f"going on without compiled kernels, more slowly: {error}"
        warnings.warn(what, KernelsWarning, stacklevel=2)
        return False
    return True


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None = left open. Raises ValueError for others than `DTYPES`."""
    if dtype is None:
        return None
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; there are: {', '.join(DTYPES)}")
    return DTYPES[dtype]
