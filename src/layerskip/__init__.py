"""Make one language model faster by itself: layer dropout, early exit, self-speculative decoding."""

__version__ = "0.1.0.dev0"
