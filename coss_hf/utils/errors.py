"""Errors that end a run."""


class RunStopped(RuntimeError):
    """A run cannot continue; the message tells why, and what is on disk."""


class NonFiniteLoss(RunStopped):
    """The loss became NaN or infinite; the message names the step and the images.

    Attributes:
        found: whether images of this process caused it.
    """

    def __init__(self, message: str, found: bool = False):
        super().__init__(message)
        self.found = found


class CheckpointError(RunStopped):
    """A checkpoint could not be written; earlier checkpoints are complete."""
