"""Decoding: plain, by early exit, and self-speculative. Read `reference.py` first."""

from layerskip.decoding.config import DRAFT_SOURCES, MODES, DecodingConfig
from layerskip.decoding.drafters import Candidate, Draft, Drafter, register_drafter
from layerskip.decoding.generate import Step, generate, iter_exit_hidden_states
from layerskip.decoding.language_model import LayerSkipModel
from layerskip.decoding.prefix_cache import PrefixCache
from layerskip.decoding.prompt import PromptError
from layerskip.decoding.sampling import Sampling
from layerskip.decoding.streaming import Answer, Generation, Piece

Prefix = PrefixCache  # its name until 0.1
walk_exits = iter_exit_hidden_states  # its name until 0.1

__all__ = [
    "DRAFT_SOURCES",
    "MODES",
    "Answer",
    "Candidate",
    "DecodingConfig",
    "Draft",
    "Drafter",
    "Generation",
    "LayerSkipModel",
    "Piece",
    "Prefix",
    "PrefixCache",
    "PromptError",
    "Sampling",
    "Step",
    "generate",
    "iter_exit_hidden_states",
    "register_drafter",
    "walk_exits",
]
