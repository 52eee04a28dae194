"""The lean decoder used for inference, the files it is made from, and its kernels."""

from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.cache import KVCache
from layerskip.model.checkpoint import Checkpoint, Files, load, open_files
from layerskip.model.decoder import Decoder, GoesOn, most_likely, read_draft
from layerskip.model.families import FAMILIES
from layerskip.model.files.json_files import CheckpointError
from layerskip.model.files.merge import merge
from layerskip.model.files.settings import Settings, StepCosts
from layerskip.model.files.source import SourceError, pull, resolve

__all__ = [
    "FAMILIES",
    "Architecture",
    "Checkpoint",
    "CheckpointError",
    "Decoder",
    "Files",
    "GoesOn",
    "KVCache",
    "Settings",
    "SourceError",
    "StepCosts",
    "UnsupportedModelError",
    "load",
    "merge",
    "most_likely",
    "open_files",
    "pull",
    "read_draft",
    "resolve",
]
