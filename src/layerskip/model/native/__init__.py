"""The layers compiled for the CPU at hand: the fast path of `model` (see `kernels.cpp`)."""

from layerskip.model.native.build import NoCompilerError, prepare, threads_of, usable
from layerskip.model.native.native_decoder import NativeDecoder, supports
from layerskip.model.native.packed import PanelEmbedding, PanelMatrix

__all__ = [
    "NativeDecoder",
    "NoCompilerError",
    "PanelEmbedding",
    "PanelMatrix",
    "prepare",
    "supports",
    "threads_of",
    "usable",
]
