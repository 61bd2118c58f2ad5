"""Parts of error messages: the flag at fault, and the first line of another error."""


def flag(argument: str, option: str = "") -> str:
    """Name of a network or of its option in errors: ``--teacher_size`` on the command line, ``size`` in a call."""
    if argument:
        return f"--{argument}_{option}".rstrip("_")
    return option or "model"


def first_line(error: Exception) -> str:
    """First line of an error's message, without its full stop; the error's type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def first_names(names: list[str], count: int = 5) -> str:
    """The first of several names, and how many more there are: ``a.png, b.png and 3 more``."""
    listed = ", ".join(names[:count])
    return f"{listed} and {len(names) - count} more" if len(names) > count else listed
