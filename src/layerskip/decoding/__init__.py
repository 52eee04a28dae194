"""Decoding: plain, by early exit, and self-speculative."""

from layerskip.decoding.answer import Answer, Piece
from layerskip.decoding.exit_states import iter_exit_hidden_states
from layerskip.decoding.generate import generate
from layerskip.decoding.generation import Generation
from layerskip.decoding.language_model import LayerSkipModel
from layerskip.decoding.policy import DRAFT_SOURCES, MODES, Plan
from layerskip.decoding.prefix import Prefix
from layerskip.decoding.prompt import PromptError
from layerskip.decoding.sampling import Sampling
from layerskip.decoding.step import Step

__all__ = [
    "DRAFT_SOURCES",
    "MODES",
    "Answer",
    "Generation",
    "LayerSkipModel",
    "Piece",
    "Plan",
    "Prefix",
    "PromptError",
    "Sampling",
    "Step",
    "generate",
    "iter_exit_hidden_states",
]
