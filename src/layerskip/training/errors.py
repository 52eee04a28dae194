"""What stops a training run."""


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or not a number; no step was taken with it."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""
