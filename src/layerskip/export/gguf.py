"""A GGUF file: llama.cpp's names, row order, metadata and block formats, through the `gguf` package."""

import contextlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType, LlamaFileType

from layerskip.export import gguf_tokenizer
from layerskip.export.hf import check_tensors, config
from layerskip.export.source import (
    EMBEDDING,
    Calibration,
    ExportReport,
    Progress,
    Source,
    cast,
    new_file,
)
from layerskip.model import UnsupportedModelError, families
from layerskip.model import decoder as rotary
from layerskip.model.architecture import Rope
from layerskip.model.quantize import Quantized
from layerskip.model.weights import ROPE_FACTORS, GgufFile

_FILE_TYPES = {
    Kind.F32: LlamaFileType.ALL_F32,
    Kind.F16: LlamaFileType.MOSTLY_F16,
    Kind.BF16: LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    Kind.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    Kind.Q4_1: LlamaFileType.MOSTLY_Q4_1,
}
GGUF_WEIGHTS = {kind.name.lower(): kind for kind in _FILE_TYPES}
_WRITTEN_ANEW = (
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.size_label",
)
_METADATA_BYTES = 50_000_000  # upper bound for a large vocabulary


def to_gguf(
    source: Source,
    path: Path,
    *,
    weights: str | None = None,
    embedding: str | None = None,
    calibrated: Calibration | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Write a GGUF file for llama.cpp, one tensor in memory at a time.

    Vectors stay F32. A matrix whose rows are not whole blocks is F16. A tensor that already has its
    storage type is copied byte by byte.

    Args:
        source: from `open_source`.
        path: the file to make; its name ends in .gguf.
        weights: a key of `GGUF_WEIGHTS`; None keeps each tensor as it is stored.
        embedding: the same for embedding and head; None: Q8_0 with 4-bit weights, as in int4 inference,
            else as `weights`.
        calibrated: from `calibrate`: replaces the source's matrices.
        overwrite: replace an existing file.
        progress: called after each tensor.

    Raises:
        ExportError: the file cannot be written.
        ValueError: the source is damaged, or GGUF cannot represent a part of it.

    Warns:
        TokenizerWarning: the file tokenizes some texts differently.
    """
    if weights is not None and weights not in GGUF_WEIGHTS:
        raise ValueError(f"weights is {weights!r}; of a GGUF file: {', '.join(GGUF_WEIGHTS)}")
    if path.suffix != ".gguf":
        raise ValueError(f"{path} does not end in .gguf; give the file such a name")
    tensors, names = source.files.tensors, source.names
    if not isinstance(tensors, GgufFile):  # llama.cpp would not load tensors of other shapes
        from transformers import AutoConfig

        check_tensors(source, AutoConfig.for_model(**config(source, torch.float32)))
    architecture = _gguf_architecture(source)
    gguf_names = _gguf_names(names, architecture, source.architecture.n_layers)
    replaced = {} if calibrated is None else calibrated.tensors
    kinds = {name: _storage_type(source, name, weights, embedding) for name in names}
    kinds |= {name: weight.kind for name, weight in replaced.items()}
    factors = _rope_factors(source)

    writer = gguf.GGUFWriter(None, architecture)
    _add_metadata(writer, source, _file_type(kinds))
    gguf_tokenizer.add(writer, source)
    if factors is not None:
        writer.add_tensor_info(
            ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes, raw_dtype=Kind.F32
        )
    n_bytes = 0 if factors is None else factors.nbytes
    for name in names:
        shape, kind = tensors.shape(name), kinds[name]
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, kind))
        writer.add_tensor_info(gguf_names[name], shape, np.dtype(np.float32), size, raw_dtype=kind)
        n_bytes += size
    with (
        new_file(path, n_bytes=n_bytes + _METADATA_BYTES, overwrite=overwrite) as temporary,
        contextlib.closing(writer),
    ):
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for done, name in enumerate(names, start=1):
            writer.write_tensor_data(_data(source, name, kinds[name], replaced.get(name)))
            progress(done, len(names))
    return ExportReport(
        path=path,
        format="gguf",
        exit_layer=source.exit_layer,
        layers=source.architecture.n_layers,
        tied_head=source.files.tied,
        bytes=path.stat().st_size,
        tensors=len(names) + (factors is not None),
        stored_as=dict(Counter(kind.name for kind in kinds.values())),
        carried_over=sum(
            tensors.stored_as(name) == kinds[name].name and name not in replaced for name in names
        ),
        nll_change=None if calibrated is None else calibrated.rounding.nll_change,
    )


def _gguf_architecture(source: Source) -> str:
    name = families.FAMILIES[source.architecture.family].gguf_name
    assert name is not None  # of the families that are exported
    return name


def _gguf_names(names: list[str], architecture: str, n_layers: int) -> dict[str, str]:
    """Map tensor names to llama.cpp's, with the `gguf` package's table."""
    number = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, n_layers)
    gguf_names = {}
    for name in names:
        gguf_name = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UnsupportedModelError(
                f"GGUF has no name for the tensor {name} in a {architecture} model"
            )
        gguf_names[name] = gguf_name
    return gguf_names


def _storage_type(source: Source, name: str, weights: str | None, embedding: str | None) -> Kind:
    is_vocabulary = name in (EMBEDDING, "lm_head.weight")
    if is_vocabulary and (embedding is not None or weights in ("q4_0", "q4_1")):
        weights = embedding or "q8_0"
    requested = None if weights is None else GGUF_WEIGHTS[weights]
    tensors = source.files.tensors
    shape = tensors.shape(name)
    if len(shape) == 1:
        return Kind.F32
    if requested is None:
        stored = tensors.stored_as(name)
        is_kept = stored in ("F32", "F16", "BF16") or isinstance(tensors, GgufFile)
        return Kind[stored] if is_kept and stored in Kind.__members__ else Kind.F32
    block_size, _ = gguf.GGML_QUANT_SIZES[requested]
    return requested if shape[-1] % block_size == 0 else Kind.F16


def _file_type(kinds: dict[str, Kind]) -> LlamaFileType:
    """The storage type of most matrices."""
    matrices = Counter(kind for kind in kinds.values() if kind != Kind.F32)
    most = matrices.most_common(1)
    return _FILE_TYPES.get(most[0][0], LlamaFileType.GUESSED) if most else LlamaFileType.ALL_F32


def _data(
    source: Source, name: str, kind: Kind, replaced: Quantized | None
) -> "np.ndarray[Any, Any]":
    tensors, head_dim = source.files.tensors, source.architecture.head_dim
    rotary_layout = families.FAMILIES[_gguf_architecture(source)].gguf_rotary
    assert rotary_layout is not None
    if replaced is not None:
        rows = replaced.data
        if rotary_layout == "interleaved" and name.rsplit(".", 2)[-2] in ("q_proj", "k_proj"):
            rows = rotary.interleave(rows, head_dim, head_dim)
        blocks: np.ndarray[Any, Any] = rows.numpy()
        return blocks
    tensor = source.read(name, rotary_layout)
    if isinstance(tensors, GgufFile) and tensors.stored_as(name) == kind.name:
        return tensors.blocks(name)
    if kind is Kind.F16:
        tensor = cast(tensor, torch.float16, name)
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)


def _add_metadata(writer: gguf.GGUFWriter, source: Source, file_type: LlamaFileType) -> None:
    """Add all metadata but the tokenizer's; of a GGUF source, all its own fields.

    Raises:
        UnsupportedModelError: GGUF, or llama.cpp's loader of the family, cannot represent a part of it.
    """
    if isinstance(source.files.tensors, GgufFile):
        for key, value, types in source.files.tensors.fields():
            if key not in _WRITTEN_ANEW and value != []:
                is_array = types[0] == GGUFValueType.ARRAY
                writer.add_key_value(key, value, types[0], types[-1] if is_array else None)
        writer.kv_data[0].pop(f"{writer.arch}.block_count")
        if "general.quantization_version" not in writer.kv_data[0]:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    else:
        _add_general(writer, source)
        _add_architecture(writer, source)
    writer.add_block_count(source.architecture.n_layers)
    writer.add_file_type(file_type)


def _add_general(writer: gguf.GGUFWriter, source: Source) -> None:
    writer.add_type("model")
    path = source.files.path.absolute()
    if path.parent.name == "snapshots":  # the hub's cache: models--owner--name/snapshots/commit
        path = Path(path.parent.parent.name.rsplit("--", 1)[-1])
    name = path.name
    writer.add_name(name if source.exit_layer is None else f"{name} to layer {source.exit_layer}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_architecture(writer: gguf.GGUFWriter, source: Source) -> None:
    a, rope = source.architecture, source.rope
    windows = set(a.sliding_windows)
    _check_architecture(source)
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


def _check_architecture(source: Source) -> None:
    """Refuse what GGUF has no field for, and what llama.cpp's loaders of Qwen do not read."""
    a, tensors = source.architecture, source.files.names()
    if a.activation != "silu":
        reason = f"the activation {a.activation}, which GGUF has no field for in its family"
    elif len(set(a.sliding_windows)) > 1:
        reason = (
            "different attention windows in its layers, which GGUF has no field for in its family"
        )
    elif a.family == "qwen2" and a.n_heads * a.head_dim != a.hidden_size:
        reason = (
            f"{a.n_heads} heads of {a.head_dim} beside a hidden size of {a.hidden_size}, which"
            " llama.cpp does not read in its family"
        )
    elif a.family == "qwen3" and "model.layers.0.self_attn.o_proj.bias" in tensors:
        reason = "biases in its attention, which llama.cpp does not read in its family"
    else:
        return
    raise UnsupportedModelError(f"this {a.family} model has {reason}; export it with --to hf")


def _rope_factors(source: Source) -> "np.ndarray[Any, np.dtype[np.float32]] | None":
    """Divisors of the rotary frequencies, [head_dim / 2]; None for plain or linear scaling."""
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
    unscaled = rotary.frequencies(Rope(theta=rope.theta), head_dim)
    factors: np.ndarray[Any, np.dtype[np.float32]] = (
        unscaled / rotary.frequencies(rope, head_dim)
    ).numpy()
    return factors
