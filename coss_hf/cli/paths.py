"""The home folder and variables of the environment in arguments, where no shell has put them in."""

import argparse
import os
import re
from pathlib import Path

VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))")


def expand_word(word: str, argument: str = "") -> str:
    """Expand a leading ``~`` and variables in a word of a command line.

    A shell leaves them alone in ``--dataset=~/images`` and in quotes, and there is no shell in a YAML file.

    Args:
        word: a value, a flag, or ``--flag=value``.
        argument: the flag that an error names, where the word is a value.

    Raises:
        ValueError: a variable that is not set.

    Example:
        >>> os.environ["SCRATCH"] = "/scratch"
        >>> expand_word("--dataset=$SCRATCH/images")
        '--dataset=/scratch/images'
    """
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    if flag.endswith("token") or (flag and not equals):
        return word
    return flag + equals + expand(value, flag or argument)


def expand(value: str, argument: str = "") -> str:
    """Expand a leading ``~`` and variables in a value, unless there is a file of that very name.

    Args:
        value: a path, or any other value.
        argument: the flag that an error names.

    Raises:
        ValueError: a variable that is not set.
    """
    if not ("$" in value or value.startswith("~")) or os.path.exists(value):
        return value
    for braces, plain in VARIABLE.findall(value):
        name = braces or plain
        if name not in os.environ:
            raise ValueError(f"{argument} {value}: the variable {name} is not set; set it, or write the value.".strip())
    return os.path.expanduser(os.path.expandvars(value))


def path(value: str) -> Path:
    """An expanded path, as the ``type`` of an argument of ``argparse``."""
    try:
        return Path(expand(value))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
