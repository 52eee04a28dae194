"""The lean decoder used for inference, the files it is made from, and its kernels."""

from layerskip.fileio import CheckpointError
from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.checkpoint import Checkpoint, Files, Settings, StepCosts, load, open_files
from layerskip.model.decoder import Decoder, GoesOn, most_likely, read_draft
from layerskip.model.distributions import NO_NUMBERS, Distributions, Draws, pick, shares
from layerskip.model.families import FAMILIES
from layerskip.model.hub import SourceError, pull, resolve
from layerskip.model.kv_cache import KVCache

__all__ = [
    "FAMILIES",
    "NO_NUMBERS",
    "Architecture",
    "Checkpoint",
    "CheckpointError",
    "Decoder",
    "Distributions",
    "Draws",
    "Files",
    "GoesOn",
    "KVCache",
    "Settings",
    "SourceError",
    "StepCosts",
    "UnsupportedModelError",
    "load",
    "most_likely",
    "open_files",
    "pick",
    "pull",
    "read_draft",
    "resolve",
    "shares",
]
