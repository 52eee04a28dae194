"""A checkpoint as one thing: decoder, tokenizer, end tokens, and the settings that travel with it."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from layerskip.model import assembly, families
from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.decoder import Decoder
from layerskip.model.files import gguf_tokenizer, tokenizer
from layerskip.model.files.json_files import CheckpointError, read_json
from layerskip.model.files.rounding import warn_of_rounding
from layerskip.model.files.settings import Settings, read_settings
from layerskip.model.files.weights import GgufFile, SafetensorsFiles, Tensors
from layerskip.model.files.writing import replace_json
from layerskip.paths import cache_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What `load` returns; `tokenizer` is None where the checkpoint has no tokenizer files."""

    path: Path
    decoder: Decoder
    tokenizer: Any
    settings: Settings


_HEAD = "lm_head.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """What `open_files` returns: everything but the weights, which `tensors` reads one at a time.

    `config` is transformers' config with its defaults filled in; of a GGUF file, the end tokens alone.
    `tied` says that the head is the embedding.
    """

    path: Path
    architecture: Architecture
    tensors: Tensors
    config: dict[str, Any]
    tied: bool
    settings: Settings

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None (see `tokenizer.load`)."""
        return tokenizer.load(self.path, self._gguf_file)

    def write_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer's files into a folder (see `tokenizer.write`)."""
        tokenizer.write(self.path, folder, self._gguf_file)

    def names(self) -> set[str]:
        """The tensors that make the model: no head that is the embedding, no copies of the config."""
        names = families.FAMILIES[self.architecture.family].names
        left_out = {f"{names.head}.weight"} if self.tied else set()
        return {n for n in self.tensors.names() - left_out if not n.endswith(names.ignored)}

    @property
    def _gguf_file(self) -> GgufFile | None:
        return self.tensors if isinstance(self.tensors, GgufFile) else None


def load(
    path: Path,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str = "cpu",
    weights: str = "16bit",
    compiled: bool | Callable[[Architecture], bool] = False,
) -> Checkpoint:
    """Load a checkpoint folder (safetensors, or one GGUF file in it) or a GGUF file.

    `dtype` None is `assembly.fast_dtype`; `weights` says how the decoder keeps them, a key of
    `quantize.WEIGHTS`; `compiled`, whether it may run in the kernels of `native`, which have to be
    prepared, or on a GPU through `torch_compile`; or what decides that.

    Raises:
        CheckpointError: files are missing, damaged, or do not fit together.
        UnsupportedModelError: the architecture, or a part of it, is not supported; it is named.
        ValueError: `weights` is unknown.

    Warns:
        RoundingWarning: what `weights` cost this checkpoint is much or not known.
    """
    files = open_files(path)
    warn_of_rounding(path, files.tensors, weights)
    compiled = compiled(files.architecture) if callable(compiled) else compiled
    if dtype is None:
        dtype = assembly.fast_dtype(files.architecture, torch.device(device), compiled)
    return Checkpoint(
        path=path,
        decoder=assembly.build(
            files.architecture,
            files.tensors,
            tied=files.tied,
            dtype=dtype,
            device=device,
            weights=weights,
            compiled=compiled,
        ),
        tokenizer=files.tokenizer(),
        settings=files.settings,
    )


def open_files(path: Path) -> Files:
    """Open what `load` loads, without reading weights; raises what `load` raises."""
    check_no_adapter(path)
    gguf_path = _gguf_in(path)
    tensors: Tensors
    if gguf_path is not None:
        tensors = file = GgufFile(gguf_path)
        with _unusable_named(file.path):
            architecture = file.architecture()
            config: dict[str, Any] = {"eos_token_id": gguf_tokenizer.end_tokens(file)}
        tied = _HEAD not in tensors.names()
    else:
        config = _config(path)
        with _unusable_named(path / "config.json"):
            architecture = families.from_config(config)
        tensors = files = SafetensorsFiles(path)
        names = families.FAMILIES[architecture.family].names
        head, embedding = f"{names.head}.weight", f"{names.embedding}.weight"
        tied = bool(config.get("tie_word_embeddings"))
        found = files.names()
        if head not in found and _HEAD in found:  # in memory transformers has it so in every family
            files.rename(_HEAD, head)
        if tied and embedding not in found and head in files.names():  # either may stand for both
            files.rename(head, embedding)
        if tied and {head, embedding} <= tensors.names():  # the numbers say more than the config
            tied = torch.equal(tensors.read(head).float(), tensors.read(embedding).float())
        if not tied and head not in tensors.names():
            raise CheckpointError(
                f"{path} has no tensor {head}, and its config ties no head to the embedding"
            )
    return Files(
        path=path,
        architecture=architecture,
        tensors=tensors,
        config=config,
        tied=tied,
        settings=read_settings(path, config, architecture.vocab_size),
    )


def check_no_adapter(folder: Path) -> None:
    """Refuse an adapter, as peft writes it, alone or beside weights.

    transformers would put one that lies beside weights on, be it a pickle; we do not.

    Raises:
        UnsupportedModelError: there is one; where it is alone, its base is named if it is known.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    if (folder / "config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} has an adapter beside its weights: merge it (peft's merge_and_unload), or take"
            " adapter_config.json away"
        )
    base = read_json(file).get("base_model_name_or_path")
    named = f", {base}," if base else ""
    raise UnsupportedModelError(
        f"{folder} is a LoRA adapter; merge it into its base{named} first (peft's merge_and_unload)"
    )


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file to read, or None where the folder holds safetensors."""
    if path.is_file():
        return path
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    if not files:
        others = sorted(p.name for p in [*path.glob("*.bin"), *path.glob("*.pt")])
        hint = (
            f" ({others[0]} is a pickle and is not read; save it as safetensors)" if others else ""
        )
        raise CheckpointError(f"{path} holds neither safetensors nor a GGUF file{hint}")
    if len(files) > 1 and all(re.search(r"-\d{5}-of-\d{5}$", file.stem) for file in files):
        raise CheckpointError(
            f"{path} holds a GGUF file in parts; join them with llama-gguf-split --merge"
        )
    if len(files) > 1:
        raise CheckpointError(f"{path} holds several GGUF files; name one of them as the model")
    return files[0]


def _config(folder: Path) -> dict[str, Any]:
    """`config.json` with the defaults of its model type filled in by transformers.

    Kept in the cache: transformers' configurations import all of its modelling, which would take a third
    of the time to a first answer.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; it says what kind of model this is")
    stored = read_json(path)
    families.family_of(str(stored.get("model_type")))
    with _unusable_named(path):  # before transformers makes something for each of them
        families.check_n_layers(int(stored.get("num_hidden_layers", 1)))
    depends_on = importlib.metadata.version("transformers").encode() + b"\0" + path.read_bytes()
    name = f"{hashlib.sha256(depends_on).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, CheckpointError):  # no cache, not there, or damaged
        return read_json(cache_folder() / "configs" / name)
    from transformers import AutoConfig

    with _unusable_named(path):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        filled: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # A cache that cannot be written is no reason to stop, nor is half an emoji, which is no UTF-8.
    with contextlib.suppress(OSError, UnicodeEncodeError):
        configs = cache_folder() / "configs"
        configs.mkdir(parents=True, exist_ok=True)
        replace_json(configs / name, filled)
    return filled


@contextlib.contextmanager
def _unusable_named(path: Path) -> Iterator[None]:
    """Turn a complaint about values into one line that names the file they are from."""
    try:
        yield
    except (CheckpointError, UnsupportedModelError):
        raise
    except Exception as error:  # transformers validates with error types of its own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be used: {reason}") from error
