"""Errors and warnings of training runs."""


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite; the optimizer did not use it."""


class UnwrittenCheckpointError(OSError):
    """A checkpoint or result could not be written; earlier checkpoints are untouched."""


class TrainingWarning(UserWarning):
    """A run differs from what its settings seem to intend."""
