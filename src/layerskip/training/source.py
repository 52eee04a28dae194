"""Where the model of a run comes from: a folder, a hub id, or a built-in alias."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.peft_utils import find_adapter_config_file

from layerskip.model.architecture import UnsupportedModelError
from layerskip.model.checkpoint import check_no_adapter
from layerskip.model.files.source import BUILTIN_MODELS, BuiltinModel, pull
from layerskip.model.files.weights import SafetensorsFiles


def pretrained(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of transformers' configurations takes for this name.

    Returns:
        The folder or hub id, and further keyword arguments.

    Raises:
        ValueError: it is what `check_files` refuses, or a built-in model that cannot be fetched.
    """
    if name not in BUILTIN_MODELS or Path(name).exists():
        check_files(name)
        if not Path(name).exists():
            _check_no_adapter_on_the_hub(name)
        return name, {}
    is_gguf = isinstance(BUILTIN_MODELS[name], BuiltinModel)
    return str(pull(name)), {"gguf_file": "model.gguf"} if is_gguf else {}


def check_files(name: str) -> None:
    """Refuse files that can be decoded, or made so, but not trained: GGUF files and adapters alone.

    Args:
        name: of a model; a built-in one or a hub id passes.

    Raises:
        ValueError: it is such a file or folder; the message says what to do.
    """
    path = Path(name)
    check_no_adapter(path)
    named = ("model.safetensors", "model.safetensors.index.json")
    if any((path / name).is_file() for name in named):
        # Refuses what is damaged, and files outside of the folder, which transformers would read.
        SafetensorsFiles(path)
    kinds = {file.suffix for file in path.iterdir()} if path.is_dir() else {path.suffix}
    if ".gguf" in kinds and ".safetensors" not in kinds:
        raise ValueError(
            f"GGUF files cannot be trained: make a folder of {name} first, with layerskip export --to hf"
        )


def _check_no_adapter_on_the_hub(name: str) -> None:
    """transformers would load the base that an adapter names, and the adapter even from a pickle."""
    found = None
    # Where there is no such repository, loading it says so.
    with contextlib.suppress(OSError, ValueError):
        found = find_adapter_config_file(name)
    if found is not None:
        raise UnsupportedModelError(
            f"{name} on the hub is or has an adapter: merge it first (peft's merge_and_unload)"
        )


def pretrained_weights(name: str) -> tuple[str, dict[str, Any]]:
    """The same for a model: the weights of a GGUF file are unpacked, since packed ones do not train."""
    folder, arguments = pretrained(name)
    if arguments:
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return folder, arguments
