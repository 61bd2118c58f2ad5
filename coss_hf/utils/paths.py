"""Names that may be paths."""

import os


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two names of a network or a dataset are equal, or paths of the same folder or file."""
    if one is None or other is None or one == other:
        return one == other
    one, other = os.path.expanduser(one), os.path.expanduser(other)
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
