"""What a GGUF file says about its model: sizes, rotary embedding, window; or what its source said."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType, LlamaFileType

from layerskip.export.source import Source
from layerskip.model import UnsupportedModelError, rotary
from layerskip.model.architecture import Rope
from layerskip.model.files.weights import GgufFile

_NOT_CARRIED = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.size_label",
)


def add(writer: gguf.GGUFWriter, source: Source, file_type: LlamaFileType) -> None:
    """Add all metadata but the tokenizer's; of a GGUF source, its own fields, the tokenizer's included.

    Raises:
        UnsupportedModelError: GGUF, or llama.cpp's loader of the family, has no place for a part of it.
    """
    if isinstance(source.files.tensors, GgufFile):
        for key, value, types in source.files.tensors.fields():
            if key not in _NOT_CARRIED and value != []:
                writer.add_key_value(key, value, types[0], _of_elements(types))
        writer.kv_data[0].pop(f"{writer.arch}.block_count")
        if "general.quantization_version" not in writer.kv_data[0]:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    else:
        _add_general(writer, source)
        _add_architecture(writer, source)
    writer.add_block_count(source.architecture.n_layers)
    writer.add_file_type(file_type)


def _of_elements(types: list[GGUFValueType]) -> GGUFValueType | None:
    return types[-1] if types[0] == GGUFValueType.ARRAY else None


def _add_general(writer: gguf.GGUFWriter, source: Source) -> None:
    writer.add_type("model")
    path = source.files.path.absolute()
    if path.parent.name == "snapshots":  # of the hub's cache: models--owner--name/snapshots/commit
        path = Path(path.parent.parent.name.rsplit("--", 1)[-1])
    name = path.name
    writer.add_name(name if source.exit_layer is None else f"{name} to layer {source.exit_layer}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_architecture(writer: gguf.GGUFWriter, source: Source) -> None:
    a, rope = source.architecture, source.rope
    if a.activation != "silu":
        raise UnsupportedModelError(
            f"this {a.family} model has the activation {a.activation}, which GGUF cannot say for its"
            " family; export it with --to hf"
        )
    windows = set(a.sliding_windows)
    if len(windows) > 1:
        raise UnsupportedModelError(
            f"the layers of this {a.family} model have different attention windows, which GGUF"
            " cannot say for its family; export it with --to hf"
        )
    _check_qwen(source)
    writer.add_vocab_size(a.vocab_size)
    writer.add_context_length(a.max_context)
    writer.add_embedding_length(a.hidden_size)
    writer.add_feed_forward_length(a.ffn_size)
    writer.add_head_count(a.n_heads)
    writer.add_head_count_kv(a.n_kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if window := windows.pop():
        writer.add_sliding_window(window)


def _check_qwen(source: Source) -> None:
    """Refuse what llama.cpp's loaders of Qwen have no tensor for, or one of another shape."""
    a = source.architecture
    if a.family == "qwen2" and a.n_heads * a.head_dim != a.hidden_size:
        what = f"{a.n_heads} heads of {a.head_dim} beside a hidden size of {a.hidden_size}"
    elif a.family == "qwen3" and "model.layers.0.self_attn.o_proj.bias" in source.files.names():
        what = "biases in its attention"
    else:
        return
    raise UnsupportedModelError(
        f"this {a.family} model has {what}, which llama.cpp does not read in its family;"
        " export it with --to hf"
    )


def rope_factors(source: Source) -> "np.ndarray[Any, np.dtype[np.float32]] | None":
    """What divides the rotary frequencies, [head_dim / 2], where plain or linear scaling is not all."""
    rope, head_dim = source.rope, source.architecture.head_dim
    has_factors = rope.kind == "llama3" or rope.frequency_factors is not None
    is_qwen = source.architecture.family in ("qwen2", "qwen3")  # llama.cpp has none for them
    if rope.magnitude != 1.0 or rope.fraction != 1.0 or (has_factors and is_qwen):
        raise UnsupportedModelError(
            "this model's rotary embedding has no place in a GGUF file of its family;"
            " export it with --to hf"
        )
    if rope.frequency_factors is not None:
        return np.array(rope.frequency_factors, dtype=np.float32)
    if rope.kind != "llama3":
        return None
    plain = rotary.frequencies(Rope(theta=rope.theta), head_dim)
    factors: np.ndarray[Any, np.dtype[np.float32]] = (
        plain / rotary.frequencies(rope, head_dim)
    ).numpy()
    return factors
