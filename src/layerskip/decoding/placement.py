"""Device, dtype and kernels of a model, from the names that a caller gives."""

import warnings
from collections.abc import Callable

import torch

from layerskip.model import Architecture, native, torch_compile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(device: str | torch.device) -> torch.device:
    """Return the device of a name; raise ValueError where it is not available."""
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"the device {device!r} is unknown; use cpu or cuda") from error
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device {device} is not available here; use cpu")
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(f"the device {device!r} is not supported; use cpu or cuda")
    if str(resolved) == "cuda":  # each thread has a current device of its own
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


class KernelsWarning(UserWarning):
    """The layers run in PyTorch, since the compiled kernels are not available."""


def prepared(
    requested: bool | None,
    dtype: torch.dtype | None,
    device: torch.device,
    announce: Callable[[str], None],
    architecture: Architecture,
) -> bool:
    """Return True if the compiled kernels, or on a GPU `torch.compile`, are to be used and available.

    On a GPU `requested` None means eager PyTorch, because `torch.compile` was not tested on one.
    """
    if requested is False or torch_compile.supports(architecture, device):
        return bool(requested)
    dtype = torch.bfloat16 if dtype is None else dtype  # their default
    if not native.supports(architecture, dtype, device):
        if requested:
            raise ValueError(
                f"the compiled kernels have no {str(dtype).removeprefix('torch.')} of"
                f" {architecture.family} models on {device.type} (docs/reference/models.md);"
                " load without compile"
            )
        return False
    try:
        native.prepare(announce)
    except native.NoCompilerError as error:
        if requested:
            raise ValueError(f"{error}; install one, or load without compile") from error
        message = f"going on without compiled kernels, more slowly: {error}"
        warnings.warn(message, KernelsWarning, stacklevel=2)
        return False
    return True


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of a name, None for None; raise ValueError for others than `DTYPES`."""
    if dtype is None:
        return None
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; there are: {', '.join(DTYPES)}")
    return DTYPES[dtype]
