"""A base and a difference to it make a checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from layerskip.model import row_order
from layerskip.model.checkpoint import Files, open_files
from layerskip.model.families import NOT_PASSED_ON
from layerskip.model.files import difference, older_names
from layerskip.model.files.difference import Header
from layerskip.model.files.digest import sha256_of
from layerskip.model.files.json_files import CheckpointError, write_json
from layerskip.model.files.source import BUILTIN_MODELS, resolve
from layerskip.model.files.weights import damage_named
from layerskip.model.files.writing import flush, share_weights

_DTYPES = {"U8": torch.uint8, "F16": torch.float16, "F32": torch.float32}


def merge(
    difference_file: str | Path, folder: str | Path, *, base: str | Path | None = None
) -> None:
    """Write the checkpoint that a difference stands for, as an ordinary transformers folder.

    The weights are the sums in bfloat16, the tokenizer is the base's. The folder is written beside its
    place and renamed at the end: an interruption leaves nothing half-written.

    Args:
        difference_file: from `layerskip export --to difference`.
        folder: the folder to make.
        base: where the base is: a folder, a GGUF file, a hub id, or a built-in model; left out, the
            built-in model that the difference names.

    Raises:
        CheckpointError: the file is no difference or damaged, the base is another one than it was
            made from, or the folder is there already or cannot be written.
        SourceError: the base cannot be found or fetched.
    """
    difference_file, folder = Path(difference_file), Path(folder)
    if folder.exists():
        raise CheckpointError(f"{folder} exists; choose another name")
    with damage_named(difference_file):
        file = safe_open(difference_file, framework="pt")
    header = Header.from_metadata(file.metadata(), difference_file)
    found = open_files(resolve(str(base or _builtin(header, difference_file))))
    sha256 = sha256_of(found.tensors.paths)
    if sha256 != header.base_sha256:
        raise CheckpointError(
            f"{difference_file} is a difference to weights with the sha256 {header.base_sha256}, and"
            f" those of {found.path} have {sha256}; give the base that it was made from"
        )
    _check_fits(file, found, difference_file)
    try:
        parent = folder.absolute().parent
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=parent) as temporary:
            unfinished = Path(temporary) / "merged"
            unfinished.mkdir()
            _write(unfinished, header, found, file)
            flush(unfinished)
            unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def _builtin(header: Header, path: Path) -> str:
    """The base that the header names; a built-in one, since no file shall choose what is fetched."""
    if header.base not in BUILTIN_MODELS:
        raise CheckpointError(
            f"{path} is a difference to {header.base!r}, which is no built-in model; say where the"
            " base is (base=...)"
        )
    return header.base


def _check_fits(file: Any, base: Files, path: Path) -> None:
    """Raise CheckpointError where the file does not hold exactly what the base's tensors ask for."""
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    there = set(file.keys())
    for name in base.names():
        bits = difference.bits_stored(name, there)
        wanted |= difference.layout(name, base.tensors.shape(name), bits)
    if odd := wanted.keys() ^ there:
        name = min(odd)
        lacks = "lacks" if name in wanted else "has"
        raise CheckpointError(f"{path} does not fit its base: it {lacks} the tensor {name}")
    for name, (dtype, shape) in wanted.items():
        stored = file.get_slice(name)
        found = (_DTYPES.get(stored.get_dtype()), tuple(stored.get_shape()))
        if found != (dtype, shape):
            raise CheckpointError(
                f"{path} does not fit its base: the tensor {name} is {stored.get_dtype()}"
                f" {list(found[1])}, {dtype} {list(shape)} is needed"
            )


def _write(folder: Path, header: Header, base: Files, file: Any) -> None:
    config = {key: value for key, value in header.config.items() if key not in NOT_PASSED_ON}
    write_json(folder / "config.json", config | older_names.of_config(config))
    write_json(folder / "generation_config.json", header.generation_config)
    base.write_tokenizer(folder)
    state, there = {}, set(file.keys())
    for name in sorted(base.names()):
        before, shape = row_order.read(base, name, "halves").float(), base.tensors.shape(name)
        bits = difference.bits_stored(name, there)
        stored = [file.get_tensor(part) for part in difference.layout(name, shape, bits)]
        state[name] = (before + difference.from_stored(shape, stored, bits)).to(torch.bfloat16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    share_weights(folder)
