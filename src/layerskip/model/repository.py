"""Repositories of the Hugging Face hub: fetched into the hub's own cache, listed and removed there.

The cache is shared with transformers and other programs, in its documented layout: `blobs/HASH` holds
the bytes of a file, `snapshots/COMMIT/FILE` links to it, `refs/main` names the commit. A blob that is
only partly there, `HASH.incomplete`, is completed by the next call, in whatever process.

The names of a repository's files are its owner's, and hashes and commits the server's: none of them
becomes a path before `_is_safe`, `_HASH` or `_COMMIT` has accepted it.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from layerskip.fileio import CheckpointError, read_json, replace
from layerskip.model import families
from layerskip.model.architecture import UnsupportedModelError

Announce = Callable[[str], None]
_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
_COMMIT, _HASH = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{40}(?:[0-9a-f]{24})?")
_TIMEOUT_S = 10.0  # of the first answer: without one, the hub is taken for unreachable
_CHUNK_BYTES = 1 << 20
_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
# Other formats, and copies of the weights; of folders, only additional_chat_templates is fetched.
_NOT_FILES = ("[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "*/*/*", "consolidated*")
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_NO_MODEL = re.compile(r"(^|[-._])(mmproj|imatrix)", re.IGNORECASE)  # GGUF files beside a model's
_QUANTIZATION = re.compile(r"(?i)(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|(?:BF|FP?)(?:16|32)|MXFP4\w*))$")
DEFAULT_QUANTIZATION = "Q4_K_M"  # of several; llama.cpp and ollama choose the same


class SourceError(ValueError):
    """A model cannot be found or fetched; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model in a cache folder.

    Attributes:
        name: as `--model` takes it.
        n_bytes: on the disk.
        last_used: seconds since 1970 of the last access to its files, as the file system keeps it.
        path: of the folder, or of the first GGUF file.
        is_complete: False for parts of a download that broke.
    """

    name: str
    n_bytes: int
    last_used: float
    path: Path
    is_complete: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class _File:
    """A file of a repository: its name there, size, and hash (sha256, or that of a git blob)."""

    name: str
    size: int
    hash: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Listing:
    """The state of a repository: its commit, and its files by name."""

    commit: str
    files: Mapping[str, _File]


def split_name(name: str) -> tuple[str, str | None] | None:
    """Return repository and quantization of `ORG/NAME` or `ORG/NAME:QUANT`; None for another name."""
    match = _NAME.fullmatch(name)
    return None if match is None or ".." in match[1] or "--" in match[1] else (match[1], match[2])


def fetch(name: str, announce: Announce = lambda line: None) -> Path:
    """Fetch a model that can be loaded, unless it is in the cache.

    Of `ORG/NAME` the safetensors, with config and tokenizer; where there are none, or of
    `ORG/NAME:QUANT`, one GGUF file, or all parts of one. The config is checked first, before gigabytes
    that cannot be used.

    Args:
        name: `ORG/NAME` or `ORG/NAME:QUANT`.
        announce: called with a line before a file is fetched.

    Returns:
        The folder, or the first GGUF file.

    Raises:
        SourceError: it cannot be found or fetched.
        UnsupportedModelError, CheckpointError: it cannot be loaded.
    """
    repo_id, quantization = split_name(name) or (name, None)
    with _named(repo_id):
        listing = _list(repo_id)
        names = listing.files if listing else _cached_files(repo_id)
        if quantization is None and any(fnmatch(file, "*.safetensors") for file in _select(names)):
            folder = _fetch(repo_id, listing, ["config.json"], announce)
            if (folder / "config.json").is_file():
                families.check(read_json(folder / "config.json"))
            return _fetch(repo_id, listing, _select(names), announce)
        chosen = choose(name, names, quantization)
        return _fetch(repo_id, listing, chosen, announce) / chosen[0]


def fetch_files(
    repo_id: str, patterns: Sequence[str], announce: Announce = lambda line: None
) -> Path:
    """Fetch the files of a repository that match patterns, and return its folder.

    Raises:
        SourceError: they cannot be fetched.
    """
    with _named(repo_id):
        listing = _list(repo_id)
        names = listing.files if listing else _cached_files(repo_id)
        chosen = [file for file in names if any(fnmatch(file, pattern) for pattern in patterns)]
        return _fetch(repo_id, listing, chosen, announce)


def choose(
    name: str, files: Sequence[str] | Mapping[str, Any], quantization: str | None
) -> list[str]:
    """Choose a GGUF file of a repository, and of a file in parts all of them.

    A quantization is the end of a file's name, in either case, such as Q4_K_M of model-q4_k_m.gguf; a
    longer end, up to the whole name, tells apart several such files. Without one, the only file is
    chosen, else the `DEFAULT_QUANTIZATION`.

    Args:
        name: for messages.
        files: of the repository.
        quantization: such as Q4_K_M, or None.

    Raises:
        SourceError: no file or several match; those that could be asked for are listed.
    """
    models = _gguf_models(files)
    if not models:
        raise SourceError(
            f"{name} has neither safetensors nor GGUF files on the hub, or offline none in the cache,"
            " and nothing else is fetched from there"
        )
    repo_id = name.partition(":")[0]
    end = (quantization or DEFAULT_QUANTIZATION).lower().removesuffix(".gguf")
    chosen = {stem: parts for stem, parts in models.items() if _ends_with(stem, end)}
    if quantization is None and len(models) == 1:
        chosen = models
    if len(chosen) == 1:
        (parts,) = chosen.values()
        return parts
    available = ", ".join(
        f"{repo_id}:{_quantization(stem)}" for stem in sorted(chosen or models)[:30]
    )
    if chosen:
        raise SourceError(f"{name} is the end of several files; name one of {available}")
    problem = f"no GGUF file of {quantization}" if quantization else "several GGUF files"
    raise SourceError(f"{repo_id} has {problem}; name one of {available}")


def cached() -> list[CachedModel]:
    """Return the models of the hub's cache, those of other programs too, by name."""
    import huggingface_hub

    try:
        scan = huggingface_hub.scan_cache_dir(_cache())
    except huggingface_hub.errors.CacheNotFound:
        return []
    models: dict[str, CachedModel] = {}
    for repo in scan.repos:
        if repo.repo_type != "model" or not split_name(repo.repo_id):
            continue
        for revision in repo.revisions:
            files = {
                f.file_path.relative_to(revision.snapshot_path).as_posix(): f
                for f in revision.files
                if _is_safe(f.file_path.relative_to(revision.snapshot_path).as_posix())
            }
            groups = {
                f"{repo.repo_id}:{_quantization(stem)}": parts
                for stem, parts in _gguf_models(files).items()
            }
            if others := sorted(
                files.keys() - {part for parts in groups.values() for part in parts}
            ):
                groups[repo.repo_id] = others
            for name, group in groups.items():
                blobs = {files[file].blob_path: files[file] for file in group}.values()
                first = revision.snapshot_path / group[0]
                models[name] = CachedModel(
                    name=name,
                    n_bytes=sum(b.size_on_disk for b in blobs)
                    + (models[name].n_bytes if name in models else 0),
                    last_used=max(b.blob_last_accessed for b in blobs),
                    path=first if ":" in name else revision.snapshot_path,
                )
    return sorted([*models.values(), *_incomplete()], key=lambda model: model.name)


def _incomplete() -> list[CachedModel]:
    """Return the parts of downloads that broke, one entry for each repository."""
    models = []
    for folder in _cache().glob("models--*--*"):
        repo_id = folder.name.removeprefix("models--").replace("--", "/")
        parts = [path.stat() for path in folder.glob("blobs/*.incomplete")]
        if parts and split_name(repo_id):
            models.append(
                CachedModel(
                    name=repo_id,
                    n_bytes=sum(part.st_size for part in parts),
                    last_used=max(part.st_mtime for part in parts),
                    path=folder,
                    is_complete=False,
                )
            )
    return models


def remove(name: str) -> int:
    """Remove a model from the hub's cache and return the bytes that were freed.

    Of `ORG/NAME` everything is removed, of `ORG/NAME:QUANT` that GGUF file; a blob that another
    revision needs stays.

    Raises:
        SourceError: it is not in the cache.
    """
    repo_id, quantization = split_name(name) or (name, None)
    folder = _repository(repo_id)
    if not folder.is_dir():
        raise SourceError(f"{name} is not in the cache; layerskip list shows what is")
    before = _size(folder)
    if quantization is None:
        shutil.rmtree(folder)
        shutil.rmtree(_cache() / ".locks" / folder.name, ignore_errors=True)
        return before
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    chosen = [
        snapshot / part
        for snapshot in snapshots
        for stem, parts in _gguf_models(_files_in(snapshot)).items()
        if _ends_with(stem, quantization.lower())
        for part in parts
    ]
    if not chosen:
        raise SourceError(f"{name} is not in the cache; layerskip list shows what is")
    blobs = {
        Path(os.path.normpath(path.parent / path.readlink()))
        for path in chosen
        if path.is_symlink()
    }
    for path in chosen:
        path.unlink()
    remaining_blobs = {
        path.resolve() for snapshot in snapshots for path in snapshot.rglob("*") if path.is_file()
    }
    for blob in blobs:
        if blob.parent == folder / "blobs" and blob.resolve() not in remaining_blobs:
            blob.unlink(missing_ok=True)
    freed = before - _size(folder)
    if not remaining_blobs and not [*folder.glob("blobs/*")]:
        shutil.rmtree(folder)
    return freed


# --- files of a repository


def _select(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return the files of a transformers checkpoint."""
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in _FILES)
        and not any(fnmatch(name, pattern) for pattern in _NOT_FILES)
    ]


def _gguf_models(files: Sequence[str] | Mapping[str, Any]) -> dict[str, list[str]]:
    """Group GGUF files by model: path without the part's number and `.gguf` -> parts in order."""
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        stem = file.removesuffix(".gguf")
        if stem != file and not _NO_MODEL.search(PurePosixPath(file).name):
            models.setdefault(_PART.sub("", stem), []).append(file)
    return models


def _ends_with(stem: str, end: str) -> bool:
    """Return True if a file's name, or its path, ends with this quantization."""
    stem = stem.lower()
    return stem == end or (stem.endswith(end) and stem[-len(end) - 1] in "-._/")


def _quantization(stem: str) -> str:
    """Return the quantization in a file's name; the whole name where it has none."""
    name = PurePosixPath(stem).name
    match = _QUANTIZATION.search(name)
    return match[1] if match else name


def _is_safe(name: str) -> bool:
    """Return True for a name that stays below its folder and has no control characters."""
    parts = name.split("/")
    return (
        name.isprintable()
        and "\\" not in name
        and ":" not in name
        and not {"", ".", ".."} & {*parts}
    )


# --- the hub


def _list(repo_id: str) -> _Listing | None:
    """Ask the hub for the files of a repository; None: it cannot be reached, the cache is all there is.

    Raises:
        SourceError: it answers with names or hashes that are none.
    """
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(repo_id, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception:
        if _snapshot(repo_id) is None:
            raise
        return None
    if not _COMMIT.fullmatch(str(info.sha)):
        raise SourceError(f"the hub names no commit of {repo_id}; check HF_ENDPOINT")
    files = {}
    for sibling in info.siblings or []:
        digest = str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        if not (_is_safe(sibling.rfilename) and _HASH.fullmatch(digest)):
            continue  # a name with control characters or out of its folder; nothing of ours has one
        files[sibling.rfilename] = _File(
            name=sibling.rfilename, size=int(sibling.size or 0), hash=digest
        )
    return _Listing(commit=str(info.sha), files=files)


def _fetch(
    repo_id: str, listing: _Listing | None, names: Sequence[str], announce: Announce
) -> Path:
    """Fetch files of a repository, those that are not in the cache, and return their folder."""
    if listing is None:
        snapshot = _snapshot(repo_id)
        assert snapshot is not None  # else `_list` would have failed
        return snapshot
    folder = _repository(repo_id)
    snapshot = folder / "snapshots" / listing.commit
    for name in names:
        file = listing.files.get(name)
        if file is None or (snapshot / name).is_file():
            continue
        blob = folder / "blobs" / file.hash
        if not blob.is_file():
            announce(f"fetching {name} ({file.size / 1e6:,.1f} MB)")
            _download(repo_id, listing.commit, file, blob)
        _link(snapshot / name, blob)
    snapshot.mkdir(parents=True, exist_ok=True)
    if _snapshot(repo_id) != snapshot:
        (folder / "refs").mkdir(exist_ok=True)
        replace(folder / "refs" / "main", listing.commit.encode())
    return snapshot


def _download(repo_id: str, commit: str, file: _File, blob: Path) -> None:
    """Download a file, or what is missing of it, and check its hash.

    Raises:
        SourceError: the bytes are others than the hub has announced.
    """
    import huggingface_hub
    from huggingface_hub.file_download import http_get

    utils: Any = importlib.import_module("huggingface_hub.utils")
    url = huggingface_hub.hf_hub_url(repo_id, file.name, revision=commit)
    blob.parent.mkdir(parents=True, exist_ok=True)
    incomplete = blob.with_name(f"{blob.name}.incomplete")
    lock = _cache() / ".locks" / blob.parents[1].name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with utils.WeakFileLock(lock):  # the second of two processes finds the file
        if blob.is_file():
            return
        resume_size = incomplete.stat().st_size if incomplete.is_file() else 0
        if resume_size > file.size:
            incomplete.unlink()
            resume_size = 0
        with _kept_unless_empty(incomplete), incomplete.open("ab") as part, bars_on_a_terminal():
            http_get(
                url,
                part,
                resume_size=resume_size,
                headers=utils.build_hf_headers(),
                expected_size=file.size,
                displayed_filename=file.name,
            )
        if _hash(incomplete, file) != file.hash:
            incomplete.unlink()
            raise SourceError(f"{file.name} of {repo_id} arrived damaged; try again")
        incomplete.rename(blob)


@contextlib.contextmanager
def _kept_unless_empty(incomplete: Path) -> Iterator[None]:
    """Remove a file of which nothing has arrived."""
    try:
        yield
    finally:
        if incomplete.is_file() and not incomplete.stat().st_size:
            incomplete.unlink()


def _hash(path: Path, file: _File) -> str:
    """Return the sha256 of a large file, or the hash of a git blob."""
    is_git = len(file.hash) == 40
    digest = hashlib.sha1(f"blob {file.size}\0".encode()) if is_git else hashlib.sha256()
    with path.open("rb") as stored:
        while block := stored.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _link(path: Path, blob: Path) -> None:
    """Give a blob its name in a snapshot, as a relative link, or where there are none by moving it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except FileExistsError:  # another process was faster
        pass
    except OSError:
        blob.rename(path)


# --- the cache


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _repository(repo_id: str) -> Path:
    return _cache() / f"models--{repo_id.replace('/', '--')}"


def _snapshot(repo_id: str) -> Path | None:
    """Return the folder of the newest state of a repository that is in the cache."""
    folder = _repository(repo_id)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshot = folder / "snapshots" / commit
        if _COMMIT.fullmatch(commit) and snapshot.is_dir():
            return snapshot
    return None


def _cached_files(repo_id: str) -> list[str]:
    snapshot = _snapshot(repo_id)
    return [] if snapshot is None else _files_in(snapshot)


def _files_in(snapshot: Path) -> list[str]:
    names = (p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())
    return sorted(name for name in names if _is_safe(name))


def _size(folder: Path) -> int:
    """Return the bytes of a folder's own files, links not followed."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


# --- messages


@contextlib.contextmanager
def _named(repo_id: str) -> Iterator[None]:
    """Turn an exception of the hub, or of its HTTP library, into one line that names the repository."""
    try:
        yield
    except (SourceError, UnsupportedModelError, CheckpointError):
        raise
    except Exception as error:
        raise SourceError(
            f"{repo_id} cannot be fetched from the hub: {reason_of(error).rstrip('.')};"
            f" and there is no folder {repo_id} here"
        ) from error


def reason_of(error: Exception) -> str:
    """Return the hub's message in one line, without its first line: the status and request number."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[1:] or lines) or type(error).__name__


@contextlib.contextmanager
def bars_on_a_terminal() -> Iterator[None]:
    """Hide the hub's progress bars if stderr is no terminal."""
    utils: Any = importlib.import_module("huggingface_hub.utils")
    hides = not sys.stderr.isatty() and not utils.are_progress_bars_disabled()
    if hides:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            utils.enable_progress_bars()
