"""The checkpoint that is exported, whole or up to an exit layer."""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from layerskip.fileio import flush
from layerskip.model import (
    Architecture,
    CheckpointError,
    Files,
    UnsupportedModelError,
    families,
    open_files,
    resolve,
)
from layerskip.model.architecture import Rope
from layerskip.model.tokenizer import TEMPLATES

Progress = Callable[[int, int], None]  # tensors written, and of how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A finished export.

    `stored_as` counts tensors by how they are stored (F32, BF16, Q4_1, ...); `carried_over` counts
    those whose bytes are the source's own, neither cast nor quantized again. `nll_change` is what the
    4 bits of a calibrated checkpoint cost, 0.02 = 2% more negative log-likelihood.
    """

    path: Path
    format: str
    exit_layer: int | None
    layers: int
    tied_head: bool
    bytes: int
    tensors: int
    stored_as: dict[str, int]
    carried_over: int
    nll_change: float | None = None


class ExportError(ValueError):
    """The export cannot be written where it should go; the message says why and what to do."""


@contextlib.contextmanager
def new_file(path: Path, *, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block ends well.

    Args:
        path: the file to make.
        n_bytes: what it will about take, asked of the disk first.
        overwrite: replace a file that is there.

    Raises:
        ExportError: a file is there already, or writing fails.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder, the name of a file is needed")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; choose another name or say --overwrite")
    temporary = _beside(path)
    with _failures_named(path, n_bytes):
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well; as `new_file`.

    A folder that is replaced has to hold a checkpoint alone: nothing else is deleted.
    """
    taken = check_new_folder(path, overwrite=overwrite)
    temporary = _beside(path)
    with _failures_named(path, n_bytes):
        temporary.mkdir()  # what is there already is somebody else's
        try:
            yield temporary
            flush(temporary)
            if taken:
                _exchange(temporary, path)
            else:
                if path.exists():  # and is empty; Windows renames onto no folder
                    path.rmdir()
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: Path, *, overwrite: bool) -> bool:
    """Whether the folder takes another's place; raises ExportError where it may not."""
    if not path.absolute().parent.is_dir():
        raise ExportError(
            f"there is no folder {path.parent} to write {path.name} into; make it first"
        )
    if path.exists() and (path.resolve() == Path.cwd() or os.path.ismount(path)):
        raise ExportError(
            f"{path} is where you are, or another disk, and cannot be put in place when it is whole:"
            " name a new folder in it"
        )
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise ExportError(f"{path} exists; choose another name or say --overwrite")
    if taken and not _is_only_a_checkpoint(path):
        raise ExportError(
            f"{path} is not just a checkpoint and is not replaced; choose another name"
        )
    return taken


def _beside(path: Path) -> Path:
    """A name of its own: the same pid may be another's, in another container."""
    return path.absolute().with_name(
        f".{path.absolute().name}-{os.getpid()}-{secrets.token_hex(3)}"
    )


def _exchange(new: Path, path: Path) -> None:
    """Put a folder in another's place: at no moment can both be lost."""
    old = new.with_name(f"{new.name}.old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


_PARTS_OF_A_CHECKPOINT = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template)\.json|(merges|vocab)\.txt|tokenizer\.model|chat_template\.jinja"
    rf"|{TEMPLATES}/[^/]+\.jinja"
)


def _is_only_a_checkpoint(path: Path) -> bool:
    return (path / "config.json").is_file() and all(
        inside.is_file() and _PARTS_OF_A_CHECKPOINT.fullmatch(inside.relative_to(path).as_posix())
        for inside in path.rglob("*")
        if inside != path / TEMPLATES
    )


def check_room(path: Path, n_bytes: int) -> None:
    """Raise ExportError where a disk has no room for so many bytes at `path`."""
    folder = path.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ExportError(
            f"{path} needs {n_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free;"
            " free some space or choose another place"
        )


@contextlib.contextmanager
def _failures_named(path: Path, n_bytes: int) -> Iterator[None]:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ExportError(f"the folder {folder} does not exist; make it first")
    check_room(path, n_bytes)
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} could not be written: {error}") from error


FAMILIES = tuple(name for name, family in families.FAMILIES.items() if family.is_exported)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint; with an exit layer E, its first E layers, final norm and head."""

    files: Files
    exit_layer: int | None = None

    @property
    def architecture(self) -> Architecture:
        """The source's architecture, with as many layers as are exported."""
        whole = self.files.architecture
        if self.exit_layer is None:
            return whole
        return dataclasses.replace(
            whole,
            n_layers=self.exit_layer,
            sliding_windows=whole.sliding_windows[: self.exit_layer],
            ropes=whole.ropes[: self.exit_layer],
        )

    @property
    def rope(self) -> Rope:
        """The rotary embedding, which is one for all layers in the families that are exported."""
        rope = self.files.architecture.ropes[0]
        assert rope is not None
        return rope

    @property
    def names(self) -> list[str]:
        """The tensors to export: embedding, layers one after the other, final norm, head.

        Raises:
            CheckpointError: layers do not hold the same tensors.
        """
        layers: dict[int, list[str]] = {}
        first: list[str] = []
        last: list[str] = []
        for name in sorted(self.files.names()):
            if match := _LAYER.fullmatch(name):
                layers.setdefault(int(match[1]), []).append(match[2])
            elif name == "model.embed_tokens.weight":
                first.append(name)
            else:
                last.insert(0, name)
        n_layers = self.architecture.n_layers
        if max(layers, default=-1) >= self.files.architecture.n_layers:
            raise CheckpointError(
                f"the checkpoint has layer {max(layers)}, its configuration"
                f" {self.files.architecture.n_layers} layers; fetch or save it again"
            )
        for number in range(n_layers):
            if odd := set(layers.get(number, [])) ^ set(layers.get(0, [])):
                raise CheckpointError(
                    f"layer {number} and layer 0 differ in the tensor {min(odd)};"
                    " fetch or save the checkpoint again"
                )
        inner = [f"model.layers.{i}.{part}" for i in range(n_layers) for part in layers[i]]
        return [*first, *inner, *last]


def open_source(model: str | Path, exit_layer: int | None = None) -> Source:
    """Open a checkpoint for export, without reading its weights.

    Args:
        model: a folder, a GGUF file, a built-in alias, or a hub id.
        exit_layer: E, to export a draft model of the first E layers, 1 ... L.

    Raises:
        ValueError: it cannot be found or read, is not supported (it is named), or has no such exit.
    """
    files = open_files(resolve(str(model)))
    family, n_layers = files.architecture.family, files.architecture.n_layers
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{family} models cannot be exported; these can: {', '.join(FAMILIES)}"
        )
    if exit_layer is not None and not 1 <= exit_layer <= n_layers:
        raise ValueError(f"the exit layer is {exit_layer}, this model has exits 1 to {n_layers}")
    return Source(files=files, exit_layer=exit_layer)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """A tensor in another dtype.

    Raises:
        ValueError: a number is larger than the dtype holds (65504 in float16) and would be infinite.
    """
    other = tensor.to(dtype)
    if dtype is torch.float16 and not torch.equal(other.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} has numbers that float16 does not hold; choose bf16 instead")
    return other
