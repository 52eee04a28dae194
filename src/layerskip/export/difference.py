"""What training changed in a checkpoint, as one small file (see `model.difference`)."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerskip.export import hf_config
from layerskip.export.calibrate import calibrate_difference
from layerskip.export.destination import new_file
from layerskip.export.source import Source, open_source
from layerskip.export.written import Progress, Written
from layerskip.model import CheckpointError, difference, row_order
from layerskip.model.difference import Header
from layerskip.model.digest import sha256_of


def to_difference(
    source: Source,
    path: Path,
    *,
    base: str,
    tokens: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Written:
    """Write the source's weights minus the base's, matrices in 2 bits a weight.

    Args:
        source: from `open_source`, a whole model.
        path: the file to make; its name ends in .safetensors.
        base: the checkpoint that training began with: a folder, a GGUF file, a built-in alias, or a
            hub id.
        tokens: a text like those that the checkpoint will see: errors of rounding make up for each other
            on it (`calibrate_difference`); None = every weight is rounded to the nearest level.
        overwrite: replace a file that is there.
        progress: called after each layer, if there is a text, and after each tensor.

    Raises:
        ExportError: the file cannot be written.
        ValueError: a checkpoint is damaged, or the base is of another shape.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors; give the file such a name")
    origin = open_source(base)
    _check_alike(source, origin, base)
    names = source.names
    header = Header(
        base=_called(base),
        base_sha256=sha256_of(origin.files.tensors.paths),
        config=hf_config.config(source, torch.bfloat16),
        generation_config=hf_config.generation_config(source, roundings={}),
    )
    calibrated: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    errors = _Errors()
    with new_file(path, n_bytes=_n_bytes(source), overwrite=overwrite) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        if tokens is not None:
            calibrated = calibrate_difference(source, origin, tokens, progress)
        for done, name in enumerate(names, start=1):
            change = row_order.read(source.files, name, "halves").float()
            change = change - row_order.read(origin.files, name, "halves").float()
            stored = difference.to_stored(name, calibrated.get(name, change))
            if not all(tensor.isfinite().all() for tensor in stored.values()):
                raise CheckpointError(f"the difference of {name} is too large, or no number")
            back = difference.from_stored(tuple(change.shape), list(stored.values()))
            errors.add(name, change, back)
            state |= stored
            progress(done, len(names))
        save_file(state, temporary, metadata=header.to_metadata())
        temporary.chmod(mode)
    return Written(
        path=path,
        format="difference",
        exit_layer=None,
        layers=source.architecture.n_layers,
        tied_head=source.files.tied,
        bytes=path.stat().st_size,
        tensors=len(names),
        stored_as=dict(Counter("2-bit" if f"{name}.codes" in state else "F32" for name in names)),
        carried_over=0,
        relative_errors=errors.by_kind(),
    )


class _Errors:
    """How far what is stored is from the difference, for each kind of tensor."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, change: Tensor, back: Tensor) -> None:
        """One tensor: its difference, and what the file says."""
        squares = self._squares[name.rsplit(".", 2)[-2]]
        squares[0] += float((back - change).square().sum(dtype=torch.float64))
        squares[1] += float(change.square().sum(dtype=torch.float64))

    def by_kind(self) -> dict[str, float]:
        """Norm of the error over norm of the difference; 0 where nothing changed."""
        return {
            kind: math.sqrt(error / whole) if whole else 0.0
            for kind, (error, whole) in self._squares.items()
        }


def _called(base: str) -> str:
    """What the base is called: no folders of this machine travel with the file."""
    path = Path(base).expanduser()
    return path.resolve().name if path.exists() else base


def _n_bytes(source: Source) -> int:
    return sum(
        math.prod(shape) * dtype.itemsize
        for name in source.names
        for dtype, shape in difference.layout(name, source.files.tensors.shape(name)).values()
    )


def _check_alike(source: Source, origin: Source, base: str) -> None:
    """Raise CheckpointError where the base's tensors are others, or of another shape."""
    if odd := set(source.names) ^ set(origin.names):
        raise CheckpointError(
            f"{base} is not what {source.files.path} was trained from: only one of them has the"
            f" tensor {min(odd)}"
        )
    for name in source.names:
        trained, before = source.files.tensors.shape(name), origin.files.tensors.shape(name)
        if trained != before:
            raise CheckpointError(
                f"{base} is not what {source.files.path} was trained from: {name} is {before} there,"
                f" {trained} after training"
            )
