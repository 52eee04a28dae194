"""Source of an export (a checkpoint, whole or up to an exit layer) and its destination."""

import contextlib
import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from layerskip.fileio import check_links, flush
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
from layerskip.model.checkpoint import Rounding, read
from layerskip.model.quantize import Quantized
from layerskip.model.tokenizer import TEMPLATES

FAMILIES = tuple(name for name, family in families.FAMILIES.items() if family.is_exported)
EMBEDDING = "model.embed_tokens.weight"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_CHECKPOINT_FILE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|"
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|chat_template)\.json|(merges|vocab)\.txt|tokenizer\.model|chat_template\.jinja"
    rf"|{TEMPLATES}/[^/]+\.jinja"
)

Progress = Callable[[int, int], None]
"""Called with the number of tensors written and their total number."""


class ExportError(ValueError):
    """The export cannot be written to its destination; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """A finished export.

    Attributes:
        path: the file or folder.
        format: "hf", "hf-draft" or "gguf".
        exit_layer: E of a draft model, None for a whole model.
        layers: number of layers.
        tied_head: the head is the embedding.
        bytes: size on disk.
        tensors: number of tensors.
        stored_as: number of tensors by storage type (F32, BF16, Q4_1, ...).
        carried_over: number of tensors that are stored as in the source, neither cast nor quantized.
        nll_change: relative change of the negative log-likelihood by calibrated int4 weights, 0.02 = 2%
            more; None without calibration.
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


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`.

    Attributes:
        tensors: every matrix of a layer by its name, and embedding and head if they are in 4 bits; rows
            of Q and K as in transformers.
        rounding: the change of the negative log-likelihood.
    """

    tensors: dict[str, Quantized]
    rounding: Rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """An opened checkpoint; with an exit layer E, its first E layers, final norm and head."""

    files: Files
    exit_layer: int | None = None

    def __post_init__(self) -> None:
        n_layers = self.files.architecture.n_layers
        if self.exit_layer is not None and not 1 <= self.exit_layer <= n_layers:
            raise ValueError(
                f"the exit layer is {self.exit_layer}, this model has exits 1 to {n_layers}"
            )

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
        """The rotary embedding, which all layers share in the families that are exported."""
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
            elif name == EMBEDDING:
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

    def read(self, name: str, rotary_layout: Literal["halves", "interleaved"] = "halves") -> Tensor:
        """Return a tensor, with the rows of Q and K in a rotary layout.

        Raises:
            CheckpointError: it holds NaN or infinite values, or values that are not floating-point.
        """
        tensor = read(self.files, name, rotary_layout)
        if tensor.dtype not in _DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} is stored as {dtype}, which no weight can be")
        if not tensor.isfinite().all():
            raise CheckpointError(f"{name} holds NaN or infinite values; fetch or save it again")
        return tensor


def open_source(model: str | Path, exit_layer: int | None = None) -> Source:
    """Open a checkpoint for export, without reading its weights.

    Args:
        model: a folder, a GGUF file, a built-in alias, or a hub id.
        exit_layer: E, to export a draft model of the first E layers, 1 ... L.

    Raises:
        ValueError: it cannot be found or read, is not supported (it is named), or has no such exit.
    """
    path = resolve(str(model))
    check_links(path)  # an export passes on what the files say
    files = open_files(path)
    family = files.architecture.family
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"{family} models cannot be exported; these can: {', '.join(FAMILIES)}"
        )
    source = Source(files=files, exit_layer=exit_layer)
    _check_values(source)
    return source


def _check_values(source: Source) -> None:
    """Refuse values of a configuration that other programs would read as they are."""
    a = source.architecture
    if a.max_context < 2:
        raise CheckpointError(
            f"the context length is {a.max_context} in {source.files.path};"
            " fetch or save the checkpoint again"
        )
    names, tensors = source.files.names(), source.files.tensors
    expected = (a.vocab_size, a.hidden_size)
    if EMBEDDING in names and (shape := tensors.shape(EMBEDDING)) != expected:
        raise CheckpointError(
            f"the tensor {EMBEDDING} is {shape}, the configuration has {expected} (vocabulary and"
            " hidden size); fetch or save the checkpoint again"
        )


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor in another dtype.

    Raises:
        ValueError: a value is larger than the dtype holds (65504 in float16) and would be infinite.
    """
    other = tensor.to(dtype)
    if dtype is torch.float16 and not other.isfinite().all():
        raise ValueError(f"{name} has numbers that float16 does not hold; choose bf16 instead")
    return other


@contextlib.contextmanager
def new_file(path: Path, *, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` if the block ends well.

    Args:
        path: the file to make.
        n_bytes: its approximate size, for which there has to be space.
        overwrite: replace an existing file.

    Raises:
        ExportError: the file exists already, or writing fails.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder, the name of a file is needed")
    if os.path.lexists(path) and not overwrite:
        raise ExportError(f"{path} exists; choose another name or say --overwrite")
    temporary = _temporary_path(path)
    with _write_errors(path, n_bytes):
        try:
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, n_bytes: int, overwrite: bool) -> Iterator[Path]:
    """Give an empty folder to fill, which becomes `path` if the block ends well; see `new_file`.

    A folder is replaced only if it holds nothing but a checkpoint.
    """
    replaces = check_new_folder(path, overwrite=overwrite)
    temporary = _temporary_path(path)
    with _write_errors(path, n_bytes):
        temporary.mkdir()
        try:
            yield temporary
            flush(temporary)
            if replaces:
                _exchange(temporary, path)
            else:
                if path.exists():  # and is empty; Windows renames onto no folder
                    path.rmdir()
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: Path, *, overwrite: bool) -> bool:
    """Return True if the folder replaces another one; raise ExportError if it may not."""
    if not path.absolute().parent.is_dir():
        raise ExportError(
            f"there is no folder {path.parent} to write {path.name} into; make it first"
        )
    if path.exists() and (path.resolve() == Path.cwd() or os.path.ismount(path)):
        raise ExportError(
            f"{path} is the current folder, or another disk, and cannot be replaced by a finished"
            " export: name a new folder in it"
        )
    replaces = os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))
    if replaces and not overwrite:
        raise ExportError(f"{path} exists; choose another name or say --overwrite")
    if replaces and not _is_only_a_checkpoint(path):
        raise ExportError(
            f"{path} is not just a checkpoint and is not replaced; choose another name"
        )
    return replaces


def _is_only_a_checkpoint(path: Path) -> bool:
    return (path / "config.json").is_file() and all(
        inside.is_file() and _CHECKPOINT_FILE.fullmatch(inside.relative_to(path).as_posix())
        for inside in path.rglob("*")
        if inside != path / TEMPLATES
    )


def _temporary_path(path: Path) -> Path:
    """A name of its own: in another container another process may have the same pid."""
    return path.absolute().with_name(
        f".{path.absolute().name}-{os.getpid()}-{secrets.token_hex(3)}"
    )


def _exchange(new: Path, path: Path) -> None:
    """Put a folder in another's place; at no moment can both be lost."""
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


def check_room(path: Path, n_bytes: int) -> None:
    """Raise ExportError if the disk of `path` has less than `n_bytes` free."""
    folder = path.absolute().parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ExportError(
            f"{path} needs {n_bytes / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free;"
            " free some space or choose another place"
        )


@contextlib.contextmanager
def _write_errors(path: Path, n_bytes: int) -> Iterator[None]:
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ExportError(f"the folder {folder} does not exist; make it first")
    check_room(path, n_bytes)
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} could not be written: {error}") from error
