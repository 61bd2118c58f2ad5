"""Errors that end a run, and what a command makes of them."""

import contextlib
import os
import sys


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


@contextlib.contextmanager
def bad_input_exits():
    """Turn a ``ValueError`` into one paragraph on stderr and exit code 2."""
    try:
        yield
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process of a machine finds the same
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


@contextlib.contextmanager
def stopped_run_exits():
    """Turn a ``RunStopped`` into one paragraph on stderr and exit code 1."""
    try:
        yield
    except RunStopped as error:
        if os.environ.get("RANK", "0") == "0" or error.__cause__ or getattr(error, "found", False):
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(1) from None
