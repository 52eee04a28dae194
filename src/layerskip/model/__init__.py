"""The lean decoder used for inference, and the files it is made from."""

from layerskip.model.cache import KVCache
from layerskip.model.checkpoint import Checkpoint, Settings, load
from layerskip.model.decoder import Decoder
from layerskip.model.families import FAMILIES, Architecture, UnsupportedModelError
from layerskip.model.source import SourceError, pull, resolve
from layerskip.model.weights import CheckpointError

__all__ = [
    "FAMILIES",
    "Architecture",
    "Checkpoint",
    "CheckpointError",
    "Decoder",
    "KVCache",
    "Settings",
    "SourceError",
    "UnsupportedModelError",
    "load",
    "pull",
    "resolve",
]
