"""The lean decoder used for inference, the files it is made from, and its kernels."""

from layerskip.fileio import CheckpointError
from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.checkpoint import (
    Checkpoint,
    CheckpointSettings,
    Files,
    StepCosts,
    load,
    open_files,
)
from layerskip.model.decoder import NON_FINITE_MESSAGE, Decoder, argmax
from layerskip.model.families import FAMILIES
from layerskip.model.hub import pull, resolve
from layerskip.model.kv_cache import KVCache
from layerskip.model.repository import SourceError

__all__ = [
    "FAMILIES",
    "NON_FINITE_MESSAGE",
    "Architecture",
    "Checkpoint",
    "CheckpointError",
    "CheckpointSettings",
    "Decoder",
    "Files",
    "KVCache",
    "SourceError",
    "StepCosts",
    "UnsupportedModelError",
    "argmax",
    "load",
    "open_files",
    "pull",
    "resolve",
]
