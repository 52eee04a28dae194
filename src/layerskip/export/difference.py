"""What training changed in a checkpoint, as one small file (see `model.files.difference`)."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from layerskip.export import hf_config
from layerskip.export.calibrate import MOST_COMPENSATED_BITS, calibrate_difference
from layerskip.export.destination import new_file
from layerskip.export.source import Source, layer_of, open_source
from layerskip.export.written import Progress, Written
from layerskip.model import CheckpointError, row_order
from layerskip.model.files import difference
from layerskip.model.files.difference import Header
from layerskip.model.files.digest import sha256_of


def to_difference(
    source: Source,
    path: Path,
    *,
    base: str,
    bits: int = difference.BITS,
    draft_bits: int | None = None,
    tokens: Sequence[int] | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Written:
    """Write the source's weights minus the base's, matrices in few bits a weight.

    Args:
        source: from `open_source`, a whole model.
        path: the file to make; its name ends in .safetensors.
        base: the checkpoint that training began with: a folder, a GGUF file, a built-in alias, or a
            hub id.
        bits: of a weight: 1, 2 or 4.
        draft_bits: of what drafts instead: embedding, head, and layers below the exit layer that the
            checkpoint names; None = like the others.
        tokens: a text like those that the checkpoint will see: errors of rounding in 1 and 2 bits make
            up for each other on it (`calibrate_difference`); None = every weight is rounded to the
            nearest level, as those in 4 bits always are.
        overwrite: replace a file that is there.
        progress: called after each layer, if there is a text, and after each tensor.

    Raises:
        ExportError: the file cannot be written.
        ValueError: a checkpoint is damaged, the base is of another shape, bits are others, the
            checkpoint names no exit layer to tell what drafts, or a text has nothing to change.
    """
    for number in (bits, draft_bits or bits):
        if number not in difference.LEVELS:
            raise ValueError(f"a difference has 1, 2 or 4 bits a weight, not {number}")
    if tokens is not None and min(bits, draft_bits or bits) > MOST_COMPENSATED_BITS:
        raise ValueError(
            f"a text changes nothing in {bits} bits, which are rounded to the nearest level"
        )
    exit_layer = source.files.settings.exit_layer
    if draft_bits is not None and exit_layer is None:
        raise ValueError(
            f"{source.files.path} names no exit layer, so nobody knows what drafts: leave the draft bits"
            " out, or let `layerskip tune` choose one"
        )
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} does not end in .safetensors; give the file such a name")
    origin = open_source(base)
    _check_alike(source, origin, base)
    names = source.names

    def bits_of(name: str) -> int:
        drafts = exit_layer is not None and (layer_of(name) or 0) < exit_layer
        return draft_bits if draft_bits is not None and drafts else bits

    header = Header(
        base=_called(base),
        base_sha256=sha256_of(origin.files.tensors.paths),
        config=hf_config.config(source, torch.bfloat16),
        generation_config=hf_config.generation_config(source, roundings={}),
    )
    calibrated: dict[str, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    squares, of_errors = defaultdict[str, float](float), defaultdict[str, float](float)  # by kind
    with new_file(path, n_bytes=_n_bytes(source, bits_of), overwrite=overwrite) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        if tokens is not None:
            calibrated = calibrate_difference(source, origin, tokens, bits_of, progress)
        for done, name in enumerate(names, start=1):
            change = row_order.read(source.files, name, "halves").float()
            change = change - row_order.read(origin.files, name, "halves").float()
            stored = calibrated.get(name) or difference.to_stored(name, change, bits_of(name))
            if not all(tensor.isfinite().all() for tensor in stored.values()):
                raise CheckpointError(f"the difference of {name} is too large, or no number")
            back = difference.from_stored(tuple(change.shape), list(stored.values()), bits_of(name))
            kind = name.rsplit(".", 2)[-2]
            squares[kind] += change.square().sum(dtype=torch.float64).item()
            of_errors[kind] += (back - change).square().sum(dtype=torch.float64).item()
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
        stored_as=dict(
            Counter("F32" if name in state else f"{bits_of(name)}-bit" for name in names)
        ),
        carried_over=0,
        relative_errors={
            kind: math.sqrt(of_errors[kind] / whole) if whole else 0.0
            for kind, whole in squares.items()
        },
    )


def _called(base: str) -> str:
    """What the base is called: no folders of this machine travel with the file."""
    path = Path(base).expanduser()
    return path.resolve().name if path.exists() else base


def _n_bytes(source: Source, bits_of: Callable[[str], int]) -> int:
    return sum(
        math.prod(shape) * dtype.itemsize
        for name in source.names
        for dtype, shape in difference.layout(
            name, source.files.tensors.shape(name), bits_of(name)
        ).values()
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
