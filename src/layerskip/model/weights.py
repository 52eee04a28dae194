"""Named tensors of checkpoint files: safetensors as transformers saves them, and GGUF.

Third step of loading (`hub` -> `checkpoint` -> `weights` -> `loader`). Opening a file reads its header;
the tensors stay in the file, memory-mapped, until `read` or `quantized` returns one on the CPU.
"""

import contextlib
import dataclasses
import itertools
import math
import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerskip.fileio import CheckpointError, read_json
from layerskip.model import families
from layerskip.model.architecture import (
    MAX_LAYERS,
    Architecture,
    Mixture,
    Rope,
    UnsupportedModelError,
    check_size,
)
from layerskip.model.block_formats import FORMATS
from layerskip.model.families import FAMILIES
from layerskip.model.quantize import Quantized

_CHUNK_WEIGHTS = 2**22  # dequantized at a time: a whole matrix would need several copies
_FLOATING = ("F32", "F16", "BF16", "F64")  # dtypes of safetensors that weights may have


class Tensors(Protocol):
    """Named tensors of a checkpoint under transformers' names, read one at a time.

    `paths` are the files that hold them; `rotary_layout` is the order of the rows of Q and K,
    "halves" or "interleaved" (see `decoder.interleave`).
    """

    paths: list[Path]
    rotary_layout: str

    def names(self) -> set[str]:
        """Return all names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it."""
        ...

    def stored_as(self, name: str) -> str:
        """Return the stored type: F32, F16, BF16, or a quantized type such as Q4_1."""
        ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor on the CPU in this dtype, None: in the stored floating dtype."""
        ...

    def quantized(self, name: str) -> Quantized | None:
        """Return a matrix as it is stored, in the file's memory; None unless it is quantized."""
        ...

    def release(self) -> None:
        """Give back the memory of what was read so far; it can be read again."""
        ...


class SafetensorsFiles:
    """One safetensors file, or several with an index; memory-mapped."""

    rotary_layout = "halves"

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        # As in transformers: beside model.safetensors an index is a leftover of an earlier save.
        if index.is_file() and not (folder / "model.safetensors").is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} names no files; fetch the checkpoint again")
            files = {str(file) for file in weight_map.values()}
            if any("\\" in file or Path(file).name != file for file in files):
                raise CheckpointError(f"{index} names files outside of its folder; it is refused")
        else:
            files = {"model.safetensors"}
        self._files = {}
        self.paths = [folder / file for file in sorted(files)]
        for path in self.paths:
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; fetch the checkpoint again")
            with damage_named(path):
                path.open("rb").close()  # safetensors reports an unreadable file as missing
                handle = safe_open(path, framework="pt")
                names = handle.keys()
                self._files.update({name: (handle, path, name) for name in names})
        self._check_dtypes()

    def _check_dtypes(self) -> None:
        """Refuse weights that are not floating point; some buffers of old checkpoints may be bool."""
        for name in self._files:
            is_weight = name.endswith(".weight") or (
                name.endswith(".bias") and len(self.shape(name)) == 1
            )
            if is_weight and (dtype := self.stored_as(name)) not in _FLOATING:
                raise UnsupportedModelError(
                    f"{name} is stored as {dtype}, weights in {', '.join(_FLOATING)} are supported"
                )

    def rename(self, stored: str, name: str) -> None:
        """Make a tensor available under another name than that in its file."""
        self._files[name] = self._files.pop(stored)

    def names(self) -> set[str]:
        """Return all names in all files."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        handle, _, stored = self._files[name]
        return tuple(handle.get_slice(stored).get_shape())

    def stored_as(self, name: str) -> str:
        """See `Tensors`."""
        handle, _, stored = self._files[name]
        return str(handle.get_slice(stored).get_dtype())

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See `Tensors`."""
        handle, path, stored = self._files[name]
        with damage_named(path):
            tensor: Tensor = handle.get_tensor(stored)
        return tensor.to(dtype or tensor.dtype)

    def quantized(self, name: str) -> Quantized | None:
        """Return None: all tensors here are floating."""
        return None

    def release(self) -> None:
        """Do nothing: tensors are read into memory of their own."""


ROPE_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


class GgufFile:
    """A GGUF file, memory-mapped; `read` dequantizes to float32."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = _parts(path)
        self._headers = headers = [_header(part) for part in self.paths]
        self._fields = headers[0].fields
        if self.field("split.count", 1) not in (0, len(headers)):
            raise CheckpointError(
                f"{path} is one of {self.field('split.count')} parts; their names have to end in"
                " -00001-of-0000N.gguf as they were published"
            )
        self._prefix = str(self._required("general.architecture"))
        n_experts = int(self.field(f"{self._prefix}.expert_count", 0))
        self.family = families.family_of_gguf(self._prefix, n_experts > 0)
        self.rotary_layout: str = str(FAMILIES[self.family].gguf_rotary)
        table = families.gguf_names(self.family)
        self._tensors = {
            name: tensor
            for header in headers
            for stored, whole in header.tensors.items()
            for name, tensor in _named(stored, whole, table, n_experts)
        }
        if len({name for h in headers for name in h.tensors}) < sum(
            len(h.tensors) for h in headers
        ):
            raise CheckpointError(f"{path} holds a tensor in several parts; fetch it again")

    def names(self) -> set[str]:
        """Return all names, in transformers' terms."""
        return set(self._tensors) - {ROPE_FACTORS, *LONGROPE_FACTORS}

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Tensors`."""
        return self._tensors[name].shape

    def stored_as(self, name: str) -> str:
        """Return the name of the GGML type."""
        return str(self._tensors[name].kind.name)

    def blocks(self, name: str) -> "np.ndarray[Any, Any]":
        """Return a tensor as it is stored, quantized blocks as bytes: a view of the mapped file."""
        return self._tensors[name].data

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """See `Tensors`; None: float32."""
        tensor = self._tensors[name]
        values = torch.empty(tensor.shape, dtype=dtype or torch.float32, device="cpu")
        data = np.atleast_2d(tensor.data)
        rows = values.view(len(data), -1)
        n = max(1, _CHUNK_WEIGHTS // max(1, rows.shape[1]))
        try:
            with damage_named(self.path):
                for i in range(0, len(rows), n):
                    rows[i : i + n] = _dequantize(data[i : i + n], tensor.kind)
                if name.endswith("norm.weight"):  # llama.cpp stores 1 + w of norms with (1 + w)
                    values -= FAMILIES[self.family].norm_offset
        except NotImplementedError as error:
            problem = f"{name} is stored as {tensor.kind.name}, which cannot be read"
            raise UnsupportedModelError(problem) from error
        return values

    def quantized(self, name: str) -> Quantized | None:
        """See `Tensors`; of matrices in a format of `block_formats`."""
        tensor = self._tensors[name]
        is_matrix = tensor.kind in FORMATS and len(tensor.shape) == 2
        return Quantized(tensor.kind, torch.from_numpy(tensor.data)) if is_matrix else None

    def release(self) -> None:
        """See `Tensors`."""
        for header in self._headers:
            header.release()

    def field(self, key: str, default: Any = None) -> Any:
        """Return a metadata value, or the default."""
        field = self._fields.get(key)
        return default if field is None else field.value

    def fields(self) -> Iterator[tuple[str, Any, list[gguf.GGUFValueType]]]:
        """Yield all metadata: key, value, and its type (of an array: ARRAY and its elements' type)."""
        for key, field in self._fields.items():
            yield key, field.value, field.types

    def _required(self, key: str) -> Any:
        value = self.field(key)
        if value is None:
            raise CheckpointError(f"{self.path} has no field {key}; fetch or convert it again")
        return value

    def _check_attention(self, head_dim: int) -> None:
        """Refuse metadata by which attention would differ from this decoder's."""
        name, row = self._prefix, FAMILIES[self.family]
        scale = float(self.field(f"{name}.attention.scale") or head_dim**-0.5)  # 0 is the default
        if not row.gguf_scales and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-5):
            raise UnsupportedModelError(
                f"attention scaled by {scale:.4g} in a GGUF file is not supported"
            )
        if int(self.field(f"{name}.attention.value_length", head_dim)) != head_dim:
            raise UnsupportedModelError(
                "values of another length than keys in a GGUF file are not supported"
            )

    def _windows(self, n_layers: int) -> tuple[int | None, ...]:
        """Return the sliding window of each layer, None for all positions."""
        window = self.field(f"{self._prefix}.attention.sliding_window")
        period = FAMILIES[self.family].gguf_windows
        # True for each layer with a window; or a number as in `gguf_windows`, 0 for everywhere.
        pattern = self.field(f"{self._prefix}.attention.sliding_window_pattern", period)
        if not window:
            return (None,) * n_layers
        if not isinstance(pattern, list):
            pattern = [pattern < 2 or (i + 1) % pattern != 0 for i in range(n_layers)]
        if period == 1 and not all(pattern):
            raise UnsupportedModelError(
                "a sliding window of some layers in a GGUF file is not supported in its family"
            )
        if len(pattern) != n_layers:
            raise CheckpointError(
                f"the pattern of windows is of {len(pattern)} layers, not {n_layers}"
            )
        return tuple(int(window) if is_local else None for is_local in pattern)

    def architecture(self) -> Architecture:
        """Return the architecture that the metadata describes.

        Raises:
            UnsupportedModelError: a part of the model is not supported.
            CheckpointError, ValueError: fields or tensors are missing, impossible or inconsistent.
        """
        name, row = self._prefix, FAMILIES[self.family]
        if not self.field(f"{name}.attention.causal", True):
            raise UnsupportedModelError("attention to later positions is not supported")
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise missing("model.embed_tokens.weight")
        n_layers = int(self._required(f"{name}.block_count"))
        check_size("block_count", n_layers, MAX_LAYERS)
        n_heads = int(self._required(f"{name}.attention.head_count"))
        check_size("attention.head_count", n_heads)
        hidden_size = int(self._required(f"{name}.embedding_length"))
        if embedding.shape[1:] != (hidden_size,):
            raise CheckpointError(
                f"the embedding has the shape {embedding.shape}, embedding_length is {hidden_size}"
            )
        head_dim = int(self.field(f"{name}.attention.key_length", hidden_size // n_heads))
        check_size("the size of a head", head_dim)
        rotated = int(self.field(f"{name}.rope.dimension_count", head_dim))
        if rotated != head_dim and self.family != "phi3":
            raise UnsupportedModelError(
                "rotary embedding of a part of each head in a GGUF file is not supported"
            )
        self._check_attention(head_dim)
        windows = self._windows(n_layers)
        attention_scale = self.field(f"{name}.attention.scale") if row.gguf_scales else None
        if n_layers == row.gguf_wide:
            attention_scale = (hidden_size / n_heads) ** -0.5
        ffn_size = int(self._required(f"{name}.feed_forward_length"))
        return Architecture(
            family=self.family,
            n_layers=n_layers,
            hidden_size=hidden_size,
            n_heads=n_heads,
            n_kv_heads=int(self.field(f"{name}.attention.head_count_kv", n_heads)),
            head_dim=head_dim,
            ffn_size=ffn_size,
            vocab_size=embedding.shape[0],
            norm_eps=float(self._required(f"{name}.attention.layer_norm_rms_epsilon")),
            max_context=int(self._required(f"{name}.context_length")),
            sliding_windows=windows,
            ropes=self._ropes(windows, rotated / head_dim),
            activation=row.gguf_activation,
            attention_scale=attention_scale or None,
            attention_cap=self._scalar("attn_logit_softcapping", 50.0)
            if row.caps_attention
            else None,
            logit_cap=self._scalar("final_logit_softcapping", 30.0 if row.caps_attention else None),
            embedding_scale=(
                math.sqrt(hidden_size)
                if row.scales_embedding
                else self._scalar("embedding_scale")
                if row.gguf_scales
                else None
            ),
            residual_scale=(self._scalar("residual_scale") if row.gguf_scales else None) or 1.0,
            logit_scale=1.0 / ((self._scalar("logit_scale") if row.gguf_scales else None) or 1.0),
            mixture=self._mixture(ffn_size, n_layers) if row.has_experts else None,
        )

    def _scalar(self, key: str, default: float | None = None) -> float | None:
        value = self.field(f"{self._prefix}.{key}", default)
        return None if value is None else float(value)

    def _mixture(self, ffn_size: int, n_layers: int) -> Mixture:
        """Return the mixture of experts, which llama.cpp always normalizes in these families."""
        return Mixture(
            n_experts=int(self._required(f"{self._prefix}.expert_count")),
            top_k=int(self._required(f"{self._prefix}.expert_used_count")),
            ffn_size=int(self.field(f"{self._prefix}.expert_feed_forward_length") or ffn_size),
            normalized=True,
            layers=frozenset(range(n_layers)),
        )

    def _ropes(self, windows: tuple[int | None, ...], fraction: float) -> tuple[Rope | None, ...]:
        """Return the rotary embedding of each layer, None for none."""
        row, rope = FAMILIES[self.family], self._rope(self._prefix, fraction)
        local, n = rope, row.gguf_ropes
        if row.gguf_local_theta is not None:
            theta = self.field(f"{self._prefix}.rope.freq_base_swa", row.gguf_local_theta)
            local = Rope(theta=float(theta))
        return tuple(
            None if n and (i + 1) % n == 0 else local if window else rope
            for i, window in enumerate(windows)
        )

    def _rope(self, name: str, fraction: float) -> Rope:
        # llama.cpp's defaults: a factor alone means linear scaling, and once had another key.
        factor = self.field(f"{name}.rope.scale_linear", 1.0)
        factor = float(self.field(f"{name}.rope.scaling.factor", factor) or 1.0)
        scaling = self.field(f"{name}.rope.scaling.type", "linear")
        short, long = (self._tensors.get(tensor) for tensor in LONGROPE_FACTORS)
        if short is not None and long is not None and self.family == "phi3":
            return Rope(
                theta=float(self.field(f"{name}.rope.freq_base", 10_000.0)),
                original_max_positions=int(
                    self._required(f"{name}.rope.scaling.original_context_length")
                ),
                frequency_factors=tuple(short.data.tolist()),
                long_factors=tuple(long.data.tolist()),
                magnitude=float(self.field(f"{name}.rope.scaling.attn_factor", 1.0)),
                fraction=fraction,
            )
        if scaling not in ("none", "linear"):
            raise UnsupportedModelError(
                f"rotary scaling {scaling!r} in a GGUF file is not supported"
            )
        factors = self._tensors.get(ROPE_FACTORS)
        return Rope(
            theta=float(self.field(f"{name}.rope.freq_base", 10_000.0)),
            kind="linear" if scaling == "linear" and factor != 1.0 else "default",
            factor=factor if scaling == "linear" else 1.0,
            frequency_factors=None if factors is None else tuple(factors.data.tolist()),
            fraction=fraction,
        )


def _parts(path: Path) -> list[Path]:
    """Return all parts of a GGUF file that was split, the first one first; else the file itself."""
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    n_parts = int(match[3])
    check_size("the number of parts", n_parts, MAX_LAYERS)
    parts = [path.with_name(f"{match[1]}-{i:05}-of-{match[3]}.gguf") for i in range(1, n_parts + 1)]
    if absent := next((part for part in parts if not part.is_file()), None):
        raise CheckpointError(f"{absent} is missing, a part of {path.name}; fetch it again")
    return parts


def _header(path: Path) -> "GgufHeader":
    with damage_named(path):
        return GgufHeader(path)


def _dequantize(data: "np.ndarray[Any, Any]", kind: GGMLQuantizationType) -> Tensor:
    """Convert stored rows to float32."""
    if kind in FORMATS:
        return Quantized(kind, torch.from_numpy(data)).dequantize()  # gguf's numbers, faster
    return torch.from_numpy(gguf.dequantize(data, kind))


def _named(
    name: str, tensor: "StoredTensor", table: dict[str, str], n_experts: int
) -> Iterator[tuple[str, "StoredTensor"]]:
    """Yield a tensor of a file under transformers' name; of experts each one under its own."""
    if not name.endswith("_exps.weight"):
        yield _transformers_name(name, table), tensor
        return
    if len(tensor.shape) != 3 or tensor.shape[0] != n_experts:
        raise CheckpointError(f"{name} has the shape {tensor.shape}, expert_count is {n_experts}")
    pattern = _transformers_name(name, table)
    for i, data in enumerate(tensor.data):
        yield pattern.format(i), StoredTensor(tensor.kind, tensor.shape[1:], data)


def _transformers_name(name: str, table: dict[str, str]) -> str:
    """Return transformers' name of a tensor in a GGUF file; its stored name if there is none."""
    stem, _, kind = name.rpartition(".")
    number = re.match(r"blk\.(\d+)\.", stem)
    if number is None:
        return f"{table[stem]}.{kind}" if stem in table else name
    part = stem[number.end() :]
    pattern = table.get(f"blk.{{}}.{part}", f"model.layers.{{}}.{part}")
    return f"{pattern.replace('{}', number[1], 1)}.{kind}"


# --- GGUF headers

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_PLAIN = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}


@dataclasses.dataclass(frozen=True)
class Field:
    """A metadata value; `types` is its type, of an array ARRAY and the type of its elements."""

    value: Any
    types: list[GGUFValueType]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a GGUF file.

    Attributes:
        kind: the GGML type.
        shape: in transformers' order, the last dimension contiguous.
        data: of that shape; of quantized types the blocks as bytes, [..., bytes of a row].
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: "np.ndarray[Any, Any]"


class GgufHeader:
    """Metadata and tensors of a GGUF file; the tensors' data are mapped from the file, not read.

    `gguf.GGUFReader` makes several arrays for each token of the vocabulary, which takes longer than
    reading all weights.

    Attributes:
        fields: metadata by key.
        tensors: by GGML's names.

    Raises:
        ValueError, struct.error: the file is no GGUF file of version 2 or 3, or it is damaged.
        UnsupportedModelError: a tensor is stored in an unknown type.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            # PyTorch wants writable memory; nothing is written, and the file would not change.
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._position = 0
        magic, version, n_tensors, n_fields = self._unpack("<4sIQQ")
        if magic != _MAGIC or version not in _VERSIONS:
            raise ValueError(f"no GGUF file of version 2 or 3: it begins with {magic!r}, {version}")
        self.fields: dict[str, Field] = self._unique(
            (self._string(), self._field()) for _ in range(n_fields)
        )
        infos = [self._tensor_info() for _ in range(n_tensors)]
        alignment = self.fields.get("general.alignment", Field(gguf.GGUF_DEFAULT_ALIGNMENT, []))
        if not isinstance(alignment.value, int) or alignment.value < 1:
            raise ValueError(f"general.alignment is {alignment.value!r}")
        start = -(-self._position // alignment.value) * alignment.value
        self.tensors: dict[str, StoredTensor] = self._unique(
            (name, self._tensor(start + offset, kind, shape)) for name, kind, shape, offset in infos
        )
        # With overlaps a small file could claim to hold any number of large tensors.
        extents = sorted(
            (offset, offset + self.tensors[name].data.nbytes) for name, *_, offset in infos
        )
        if any(begin < end for (_, end), (begin, _) in itertools.pairwise(extents)):
            raise ValueError("tensors overlap")

    def release(self) -> None:
        """Let the system take back pages of the file that were read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._file.madvise(mmap.MADV_DONTNEED)

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._file, self._position)
        self._position += struct.calcsize(layout)
        return values

    def _strings(self, n: int) -> list[str]:
        file, size, end = self._file, len(self._file), self._position
        texts = []
        for _ in range(n):  # a vocabulary is long, and every call would show
            begin = end + 8
            end = begin + int.from_bytes(file[end:begin], "little")
            if end > size:
                raise ValueError("a text ends after the end of the file")
            texts.append(file[begin:end].decode())
        self._position = end
        return texts

    def _string(self) -> str:
        return self._strings(1)[0]

    def _field(self) -> Field:
        kind = GGUFValueType(self._unpack("<I")[0])
        if kind != GGUFValueType.ARRAY:
            return Field(self._value(kind), [kind])
        element, n = self._unpack("<IQ")
        element = GGUFValueType(element)
        if element in _SCALARS:
            return Field(list(self._unpack(f"<{n}{_SCALARS[element]}")), [kind, element])
        if element == GGUFValueType.STRING:
            return Field(self._strings(n), [kind, element])
        return Field([self._value(element) for _ in range(n)], [kind, element])

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind not in _SCALARS:
            raise ValueError(f"a value of the type {kind.name} is not supported")
        return self._unpack(f"<{_SCALARS[kind]}")[0]

    def _tensor_info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self._string()
        (n_dimensions,) = self._unpack("<I")
        shape = self._unpack(f"<{n_dimensions}Q")[::-1]
        if 0 in shape:
            raise ValueError(f"{name} has the shape {shape}")
        kind, offset = self._unpack("<IQ")
        try:
            return name, GGMLQuantizationType(kind), shape, offset
        except ValueError as error:
            raise UnsupportedModelError(
                f"{name} is stored in a type ({kind}) that this version of gguf does not know;"
                " upgrade gguf"
            ) from error

    def _tensor(
        self, begin: int, kind: GGMLQuantizationType, shape: tuple[int, ...]
    ) -> StoredTensor:
        dtype = _PLAIN.get(kind, np.uint8)
        stored = shape if kind in _PLAIN else gguf.quant_shape_to_byte_shape(shape, kind)
        count = math.prod(stored)
        if begin + count * np.dtype(dtype).itemsize > len(self._file):
            raise ValueError("a tensor ends after the end of the file")
        data = np.frombuffer(self._file, dtype, count, begin).reshape(stored)
        return StoredTensor(kind, shape, data)

    @staticmethod
    def _unique(pairs: Any) -> dict[str, Any]:
        by_name: dict[str, Any] = {}
        for name, value in pairs:
            if name in by_name:
                raise ValueError(f"it holds {name} twice")
            by_name[name] = value
        return by_name


# --- errors


def missing(name: str) -> CheckpointError:
    """Return the error for a tensor that a checkpoint lacks."""
    return CheckpointError(f"the checkpoint has no tensor {name}; fetch or save it again")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError if a tensor of weights holds NaN or Inf."""
    # A sum takes a twentieth of the time, but may overflow.
    if not math.isfinite(tensor.sum().item()) and not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or Inf: the checkpoint's weights are damaged")


@contextlib.contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn a reader's exception into a CheckpointError that names the file."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, struct.error, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} is damaged or incomplete ({error}); fetch the checkpoint again"
        ) from error
