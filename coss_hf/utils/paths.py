"""Names that may be paths, and files that are to be written."""

import os
from pathlib import Path


def check_output_file(path: str | Path, option: str) -> None:
    """Check before the work that its result can be written.

    Args:
        path: the file, whose folders need not exist yet.
        option: the command line's option, for the message.

    Raises:
        ValueError: the file is a folder, or its folder cannot be made or written.
    """
    if Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file.")
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{option} {path}: {folder} is a file; give a file in a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: {folder} cannot be written; give another folder.")


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two names of a network or a dataset are equal, or paths of the same folder or file."""
    if one is None or other is None or one == other:
        return one == other
    one = os.path.expanduser(one)
    other = os.path.expanduser(other)
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
