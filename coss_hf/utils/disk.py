"""Recognition of a full disk and of caches that cannot be written, whichever error a library raises for it."""

import contextlib
import errno
import os
import re

import datasets
import huggingface_hub

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


def caches() -> dict[str, str]:
    """The folders that Hugging Face's libraries write what they load into, by the variable that sets them."""
    return {
        "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE),
        "HF_HUB_CACHE": str(huggingface_hub.constants.HF_HUB_CACHE),
        "HF_MODULES_CACHE": str(datasets.config.HF_MODULES_CACHE),
    }


def unwritable_cache(error: BaseException | None) -> tuple[str, OSError] | None:
    """The variable of the cache that could not be written and the error behind ``error``; None for another error.

    Permissions, a read-only disk, a file in the folder's place: what the error says of a path within the cache, or of a
    folder that the cache lies in. An error of a full disk may name no path.
    """
    if full := full_disk(error):
        return "HF_DATASETS_CACHE", full
    while error is not None:
        if isinstance(error, OSError):
            for variable, folder in caches().items():
                if _concerns(error, folder):
                    return variable, error
        error = error.__cause__ or error.__context__
    return None


def _concerns(error: OSError, folder: str) -> bool:
    folder = os.path.abspath(folder)
    paths = [os.path.abspath(os.fsdecode(path)) for path in (error.filename, error.filename2) if path]
    within = [path for path in paths if f"{path}/".startswith(f"{folder}/")]
    around = [path for path in paths if path != "/" and folder.startswith(f"{path}/")]
    return bool(within or around) or (not paths and f"{folder}/" in str(error))


@contextlib.contextmanager
def cache_errors_as_value_error():
    """Name the cache, not the dataset, where `datasets` fails to write its cache.

    Raises:
        ValueError: the cache cannot be written.
    """
    try:
        yield
    except Exception as error:
        if found := unwritable_cache(error):
            variable, reason = found
            raise ValueError(
                f"{variable}={caches()[variable]} cannot be written ({reason}); free some space or get the "
                f"permission, or "
                f"set {variable} to another folder."
            ) from error
        raise
