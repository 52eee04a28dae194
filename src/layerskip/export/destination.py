"""Where an export goes: written beside its place and renamed, so that it appears whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from layerskip.model.files.older_names import TEMPLATES
from layerskip.model.files.writing import flush


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
