"""Messages in the words of whoever reads them: flags for a command line, parameters for Python; and parts of messages.

Messages are written with flags (``--neighbors_k 0``), which no other text looks like. Inside ``command_line`` they stay
as they are. Everywhere else ``parameter_names`` turns those of errors into parameters (``neighbors_k=0``), and the
loggers of ``get_logger`` turn those of log lines.
"""

import contextlib
import contextvars
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from coss_hf.utils.errors import RunStopped

_ON_COMMAND_LINE = contextvars.ContextVar("on_command_line", default=False)
_IN_CALL = contextvars.ContextVar("in_call", default=False)
# Commands to type keep their flags: up to the end of the clause, or in backticks.
_COMMAND = r"`[^`]*`|(?:\bcoss-hf|\bpython|\baccelerate launch|\bhf|\bdocker|\bpip)\s[^;,)`]*"
# After --method stands the name of a loss, whichever there are by now.
_LOSS = r"(?<=--method )(?!(?:and|or|of|in|with|is|to|for)\b)[a-z]\w*"
# A name with a hyphen is an option of another program.
_FLAG = r"(?<![\w-])--(?P<name>[a-z]\w*)(?![\w-])(?: (?P<value>'[^']*'|-?\d+(?:\.\d+)?|{loss}|{values})(?![-./]?\w))?"
_VALUES = (
    "auto|none|no|steps|epoch|skip|error|random|pretrained|teacher_layers|mlp|linear|float32|bfloat16|float16|dynamic|"
    "static|cls|mean|pooler|gap|tower|projected|exact|ivf|hnsw|cifar|imagenet|moco|true|false"
)
_COMMAND_OR_FLAG = re.compile(f"{_COMMAND}|{_FLAG.format(loss=_LOSS, values=_VALUES)}")
# What messages call the command that runs, and the lines of Python that run.
_PHRASES = {
    "give the same command with --resume_from_checkpoint": "call train(resume_from_checkpoint=True) in the same lines",
    "resume with --resume_from_checkpoint": "resume by train(resume_from_checkpoint=True)",
    "give the same command again": "run the same lines again",
    "give the same command once it can be": "run the same lines once it can be",
    "--overwrite_output_dir": "overwrite_output_dir=True",
}


@contextlib.contextmanager
def command_line() -> Iterator[None]:
    """In the block, messages are for somebody at a command line."""
    token = _ON_COMMAND_LINE.set(True)
    try:
        yield
    finally:
        _ON_COMMAND_LINE.reset(token)


@contextlib.contextmanager
def parameter_names(**own: str) -> Iterator[None]:
    """Errors of the block, or of the function that it decorates, name parameters unless a command runs.

    Of several such calls inside each other the outermost does it: those within see messages as they were written.

    Args:
        own: names of the function's parameters, by the names that the command line has for them.
    """
    if _IN_CALL.get():
        yield
        return
    token = _IN_CALL.set(True)
    try:
        yield
    except (ValueError, RunStopped) as error:
        error.args = tuple(for_reader(one, own) if isinstance(one, str) else one for one in error.args)
        raise
    finally:
        _IN_CALL.reset(token)


class _ForReader(logging.Filter):
    """Turns flags of log lines into parameters, unless a command runs."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            message = record.getMessage()
        except Exception:  # a format that does not fit: `logging` says so itself, and no training ends of it
            return True
        if "--" in message:
            record.msg = for_reader(message)
            record.args = ()
        return True


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, whose lines name flags where a command runs, and parameters in Python.

    Args:
        name: ``__name__`` of the module.

    Example:
        >>> get_logger("coss_hf.example").name
        'coss_hf.example'
    """
    logger = logging.getLogger(name)
    # Each logger needs its own: those of a parent do not see the records of its children.
    if not any(isinstance(one, _ForReader) for one in logger.filters):
        logger.addFilter(_ForReader())
    return logger


def on_command_line() -> bool:
    """Whether a command runs, and not somebody's lines of Python."""
    return _ON_COMMAND_LINE.get()


def for_reader(message: str, own: Mapping[str, str] | None = None) -> str:
    """A message that was written with flags, in the words of its reader.

    Args:
        message: with flags.
        own: other names of parameters in Python, by flag.

    Example:
        >>> for_reader("--neighbors_k=3: use --neighbors_k 0, or `coss-hf neighbors --dataset DIR`.")
        'neighbors_k=3: use neighbors_k=0, or `coss-hf neighbors --dataset DIR`.'
    """
    if _ON_COMMAND_LINE.get():
        return message
    for phrase, in_python in _PHRASES.items():
        message = message.replace(phrase, in_python)
    return _COMMAND_OR_FLAG.sub(lambda found: _as_parameter(found, own or {}), message)


def _as_parameter(found: re.Match, own: Mapping[str, str]) -> str:
    if found["name"] is None:
        return found[0]
    name = own.get(found["name"], found["name"])
    value = found["value"]
    if value is None:
        return name
    if value in ("true", "false"):
        return f"{name}={value.capitalize()}"
    return f"{name}={value}" if value[0] in "'-0123456789" else f'{name}="{value}"'


def command_to(name: str) -> str:
    """How a command is typed: ``coss-hf train-teacher``, or by a script of ``recipes/`` where such a one runs."""
    script = Path(sys.argv[0])
    folder = script.absolute().parent
    in_clone = script.suffix == ".py" and folder.name == "recipes" and folder.parent.name != "coss_hf"
    if in_clone and not os.environ.get("COSS_HF_COMMAND"):
        return f"python {script.with_name(name.replace('-', '_') + '.py')}"
    return f"coss-hf {name}"


def flag(argument: str, option: str = "") -> str:
    """Name of a network or of its option in errors: ``--teacher_size`` on the command line, ``size`` in a call.

    Of commands of one network, ``--model``, the options are called ``--pooling`` and ``--space``.
    """
    if argument == "model" and option:
        return f"--{option}"
    if argument:
        return f"--{argument}_{option}".rstrip("_")
    return option or "model"


def check_present(**values) -> None:
    """Refuse what was left out, all of it at once.

    Args:
        values: by argument.

    Raises:
        ValueError: the arguments that are missing.
    """
    missing = [f"--{name}" for name, value in values.items() if not value]
    if missing:
        listed = " and ".join(part for part in (", ".join(missing[:-1]), missing[-1]) if part)
        raise ValueError(f"{listed} {'is' if len(missing) == 1 else 'are'} missing; see --help.")


def did_you_mean(names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the names that it may mean; empty without any.

    Example:
        >>> did_you_mean(["cifar10", "cifar100"])
        ' Did you mean cifar10 or cifar100?'
    """
    listed = " or ".join(names)
    return f" Did you mean {listed}?" if listed else ""


def first_line(error: Exception) -> str:
    """First line of an error's message, without its full stop; the error's type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def first_names(names: list[str], count: int = 5) -> str:
    """The first of several names, and how many more there are: ``a.png, b.png and 3 more``."""
    listed = ", ".join(names[:count])
    return f"{listed} and {len(names) - count} more" if len(names) > count else listed
