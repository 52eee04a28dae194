"""Where the model of a run comes from: a folder, a hub id, or a built-in alias."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from layerskip.model.source import BUILTIN_MODELS, BuiltinModel, pull


def pretrained(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` of transformers' configurations takes for this name.

    Returns:
        The folder or hub id, and further keyword arguments.
    """
    if name not in BUILTIN_MODELS or Path(name).exists():
        return name, {}
    is_gguf = isinstance(BUILTIN_MODELS[name], BuiltinModel)
    return str(pull(name)), {"gguf_file": "model.gguf"} if is_gguf else {}


def pretrained_weights(name: str) -> tuple[str, dict[str, Any]]:
    """The same for a model: the weights of a GGUF file are unpacked, since packed ones do not train."""
    folder, arguments = pretrained(name)
    if arguments and hasattr(transformers, "GgufConfig"):
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return folder, arguments
