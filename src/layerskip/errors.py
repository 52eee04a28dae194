"""What stops a training run."""


class NonFiniteLossError(ValueError):
    """The loss became infinite or not a number; no step was taken with it."""


class UnwrittenCheckpointError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


class TrainingWarning(UserWarning):
    """A run does something else than was probably meant."""
