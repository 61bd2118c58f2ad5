"""Errors that end a run, and what a command makes of them."""

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path

from coss_hf.utils.ending import ENDING

# Seconds in which a process with an error ends, which takes some with a GPU, and its launcher then ends the others.
LAUNCHER_ENDS = 10.0


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


class NonFiniteEmbedding(RunStopped, ValueError):
    """A network gave NaN or infinity for some images; the message names them."""


class CheckpointError(RunStopped):
    """A checkpoint could not be written; earlier checkpoints are complete."""


class LostWorker(RunStopped):
    """A process that loads images ended before its time.

    Args:
        error: what PyTorch's loader says of it; None where it belonged to another process of the run.
        saved: clause that tells what is on disk, and what to do; None for nothing.

    Attributes:
        elsewhere: whether another process of the run lost it, and says so.
    """

    def __init__(self, error: Exception | None, saved: str | None = None):
        self.elsewhere = error is None
        self._given = (error, saved)
        text = str(error).strip() or type(error).__name__
        said = "in another process" if error is None else f"({text.splitlines()[-1].rstrip('.')})"
        super().__init__(
            f"A process that loads images ended {said}: {saved or 'nothing was saved; give the same command again'}. "
            f"If it was for want of memory or of shared memory (/dev/shm), lower --dataloader_num_workers."
        )

    def __reduce__(self):
        """Pickle with the arguments of the constructor: trials of a study run in other processes."""
        error, saved = self._given
        return type(self), (error if error is None else RuntimeError(str(error) or type(error).__name__), saved)


# Any of them may be what a lost worker looks like from its parent; see `is_lost_worker`.
WORKER_ERRORS = (RuntimeError, OSError, EOFError)


def is_lost_worker(error: BaseException) -> bool:
    """Whether an error is that of a loader worker that was killed or died, or that found no shared memory."""
    text = str(error)
    if isinstance(error, RuntimeError):
        if text.startswith("DataLoader worker (pid") or "unable to allocate shared memory" in text:
            return True
    # A worker takes with it what it has not handed over yet, and the locks of a new one lie in shared memory.
    files = {Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)}
    return isinstance(error, WORKER_ERRORS) and any(
        file.parent.name == "multiprocessing" and file.stem in ("resource_sharer", "reduction", "synchronize")
        for file in files
    )


class UnreadableImage(RunStopped, ValueError):
    """An image can no longer be decoded; the message names it. Bad input before the first step, the end of a run after.

    Attributes:
        found: always True, the process that reads an image tells of it.
    """

    found = True

    def __init__(self, message: str):
        # Out of a loader worker the message comes as the end of a printed traceback.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


@contextlib.contextmanager
def bad_input_exits():
    """Turn a ``ValueError`` into one paragraph on stderr and exit code 2; as ``stopped_run_exits`` a ``RunStopped``."""
    try:
        with stopped_run_exits():
            yield
    except ValueError as error:
        _print_error(error, os.environ.get("LOCAL_RANK", "0") == "0")  # mostly, every process of a machine has the same
        raise SystemExit(2) from None


@contextlib.contextmanager
def stopped_run_exits():
    """Turn a ``RunStopped``, or a loader worker that was killed, into one paragraph on stderr and exit code 1."""
    from coss_hf.utils.messages import command_line  # knows the classes of this file

    try:
        try:
            with command_line():
                yield
        except WORKER_ERRORS as error:
            if not is_lost_worker(error):
                raise
            raise LostWorker(error) from error
    except RunStopped as error:
        own = bool(error.__cause__) or getattr(error, "found", False)
        if own or not getattr(error, "elsewhere", False):
            _print_error(error, own or os.environ.get("RANK", "0") == "0")
        raise SystemExit(1) from None


def _print_error(error: Exception, at_once: bool) -> None:
    """Print an error in one paragraph. Where all processes have the same one, it is printed once on each machine.

    The process that prints at once ends, and its launcher then ends the others of its machine, which wait for that. A
    process that is still there has an error of its own. On a machine on which none prints at once, its first process
    prints after that time, and the others wait for that, too.
    """
    named = ""
    if not at_once:
        local = os.environ.get("LOCAL_RANK", "0")
        is_first_machine = os.environ.get("RANK", "0") == local
        end = time.monotonic() + (1 if is_first_machine or local == "0" else 2) * LAUNCHER_ENDS
        while time.monotonic() < end:
            if ENDING.received is not None:
                return
            time.sleep(0.05)
        named = f"process {os.environ.get('RANK', '?')}: "
    print(f"error: {named}" + " ".join(str(error).split()), file=sys.stderr, flush=True)
