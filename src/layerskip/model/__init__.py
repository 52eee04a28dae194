"""The lean decoder used for inference, and the files it is made from."""

from layerskip.model.architecture import Architecture, UnsupportedModelError
from layerskip.model.cache import KVCache
from layerskip.model.checkpoint import Checkpoint, Files, load, open_files
from layerskip.model.decoder import Decoder, GoesOn, most_likely, read_draft
from layerskip.model.families import FAMILIES
from layerskip.model.files import CheckpointError
from layerskip.model.merge import merge
from layerskip.model.settings import Settings, StepCosts
from layerskip.model.source import SourceError, pull, resolve

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
