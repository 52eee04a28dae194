"""The lean decoder used for inference, the files it is made from, and its kernels."""

from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.cache import KVCache
from layerskip.model.checkpoint import Checkpoint, Files, load, open_files
from layerskip.model.decoder import Decoder, GoesOn, most_likely, read_draft
from layerskip.model.distributions import NO_NUMBERS, Distributions, Draws, pick, shares
from layerskip.model.families import FAMILIES
from layerskip.model.files.json_files import CheckpointError
from layerskip.model.files.settings import Settings, StepCosts
from layerskip.model.files.source import SourceError, pull, resolve

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
