"""Recognition of a full disk, whichever error a library raises for it."""

import contextlib
import errno

import datasets

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk (or of a limit on the size of files) behind ``error``; None where there is none.

    Libraries raise other errors on top of it: pyarrow "I/O operation on closed file", `datasets` one of its own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
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
