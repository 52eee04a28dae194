"""The layers compiled for the CPU at hand: the fast path of `model` (see `kernels.cpp`)."""

from layerskip.model.native.build import NoCompilerError, prepare
from layerskip.model.native.decoder import NativeDecoder, supports
from layerskip.model.native.panels import PanelEmbedding, PanelMatrix
from layerskip.model.native.threads import threads_of, usable

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
