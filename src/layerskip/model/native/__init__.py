"""The layers compiled for this machine's CPU: the fast path of `model` (see `kernels.cpp`)."""

from layerskip.model.native.build import (
    NoCompilerError,
    num_threads_of,
    num_threads_to_use,
    prepare,
)
from layerskip.model.native.native_decoder import NativeDecoder, supports
from layerskip.model.native.packed import PackedEmbedding, PackedLinear, PackedMatrix

__all__ = [
    "NativeDecoder",
    "NoCompilerError",
    "PackedEmbedding",
    "PackedLinear",
    "PackedMatrix",
    "num_threads_of",
    "num_threads_to_use",
    "prepare",
    "supports",
]
