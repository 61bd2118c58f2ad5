"""Recognition of a full disk, whichever error a library raises for it."""

import contextlib
import errno
import os
import re

import datasets

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries that are not written in Python only say so in their message, PyTorch hardly there.
SAFETENSORS = re.compile(r"os error (\d+)")
TORCH = ("unexpected pos ", "iostream error", "PytorchStreamWriter failed")


def full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk (or of a limit on the size of files) behind ``error``; None where there is none.

    Libraries raise other errors on top of it: pyarrow "I/O operation on closed file", `datasets` one of its own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        if (found := _in_words(str(error))) is not None:
            return found
        error = error.__cause__ or error.__context__
    return None


def _in_words(message: str) -> OSError | None:
    number = SAFETENSORS.search(message)
    if number and int(number[1]) in FULL:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if any(part in message for part in TORCH):
        return OSError(errno.ENOSPC, "the disk is full, or a quota or a limit on the size of files is reached")
    return None


@contextlib.contextmanager
def disk_full_as_value_error():
    """Name the full disk where `datasets` fails to write its cache.

    Raises:
        ValueError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if full := full_disk(error):
            raise ValueError(
                f"HF_DATASETS_CACHE={datasets.config.HF_DATASETS_CACHE} cannot be written ({full}); make room, or set "
                f"it to another folder."
            ) from error
        raise
