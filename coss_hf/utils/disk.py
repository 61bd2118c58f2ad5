"""A full disk, whatever a library makes of it."""

import contextlib
import errno

import datasets

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: BaseException | None) -> OSError | None:
    """The error of a full disk (or of a limit on the size of files) behind ``error``; None where there is none.

    Libraries raise others on top of it: pyarrow "I/O operation on closed file", `datasets` one of its own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def room_in_cache():
    """Says where room is missing when `datasets` cannot write what it keeps.

    Raises:
        ValueError: a full disk.
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
