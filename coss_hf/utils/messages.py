"""Words of error messages."""


def flag(argument: str, option: str = "") -> str:
    """How errors name a network or an option of it: ``--teacher_size`` on the command line, ``size`` in a call."""
    return f"--{argument}_{option}".rstrip("_") if argument else option or "model"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
