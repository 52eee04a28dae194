"""Export of a checkpoint, or of its first layers as a draft model, for other programs."""

from layerskip.export.calibrate import calibrate, least_bytes
from layerskip.export.gguf import GGUF_WEIGHTS, to_gguf
from layerskip.export.hf import HF_WEIGHTS, to_hf
from layerskip.export.source import (
    Calibration,
    ExportError,
    ExportReport,
    Source,
    check_new_folder,
    check_room,
    open_source,
)

__all__ = [
    "GGUF_WEIGHTS",
    "HF_WEIGHTS",
    "Calibration",
    "ExportError",
    "ExportReport",
    "Source",
    "calibrate",
    "check_new_folder",
    "check_room",
    "least_bytes",
    "open_source",
    "to_gguf",
    "to_hf",
]
