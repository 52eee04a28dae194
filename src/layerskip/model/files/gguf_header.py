"""The head of a GGUF file: metadata, and where the tensors lie.

`gguf.GGUFReader` reads the same, but makes several arrays of every token of the vocabulary, which takes
longer than all of the weights.
"""

import dataclasses
import itertools
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from layerskip.model.architecture import UnsupportedModelError

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
    """A tensor as it is stored.

    Attributes:
        kind: the GGML type.
        shape: in transformers' order, the last dimension contiguous.
        data: of that shape; of quantized kinds the blocks as bytes, [..., bytes of a row].
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: "np.ndarray[Any, Any]"


class GgufHeader:
    """Reads a file's head; the tensors' data are mapped from the file, not read.

    Attributes:
        fields: metadata by key.
        tensors: by GGML's names.

    Raises:
        ValueError, struct.error: the file is no GGUF file of version 2 or 3, or it is damaged.
        UnsupportedModelError: a tensor is stored in a type that is not known.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
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
        start = -(-self._at // alignment.value) * alignment.value
        self.tensors: dict[str, StoredTensor] = self._unique(
            (name, self._tensor(start + offset, kind, shape)) for name, kind, shape, offset in infos
        )
        # A small file could be any number of large tensors.
        held = sorted(
            (offset, offset + self.tensors[name].data.nbytes) for name, *_, offset in infos
        )
        if any(begin < end for (_, end), (begin, _) in itertools.pairwise(held)):
            raise ValueError("tensors overlap")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._file, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        begin = self._at + 8
        self._at = begin + int.from_bytes(self._file[self._at : begin], "little")
        if self._at > len(self._file):
            raise ValueError("a text goes on behind the end of the file")
        return self._file[begin : self._at].decode("utf-8")

    def _field(self) -> Field:
        kind = GGUFValueType(self._unpack("<I")[0])
        if kind != GGUFValueType.ARRAY:
            return Field(self._value(kind), [kind])
        of, n = self._unpack("<IQ")
        of = GGUFValueType(of)
        if of in _SCALARS:
            return Field(list(self._unpack(f"<{n}{_SCALARS[of]}")), [kind, of])
        return Field([self._value(of) for _ in range(n)], [kind, of])

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
            raise ValueError("a tensor goes on behind the end of the file")
        data = np.frombuffer(self._file, dtype, count, begin).reshape(stored)
        return StoredTensor(kind, shape, data)

    @staticmethod
    def _unique(pairs: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ValueError(f"it holds {name} twice")
            found[name] = value
        return found
