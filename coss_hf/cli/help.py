"""What `--help` prints: a page that is drawn once and kept, because importing what it describes takes seconds."""

import dataclasses
import enum
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin

from coss_hf.cli.options import COMMAND_SENTENCES, GROUPS, LAUNCH_OPTIONS, LAUNCHED, NOT_OFFERED, NOT_READ, SENTENCES
from coss_hf.utils.messages import command_to

PAGES = Path(__file__).parent / "help_texts"
WIDTH = 100
INDENT = 34
TRAINING_GROUPS = ("Method and neighbours", "Length and batch", "Optimizer")
# How docstrings of scripts name scripts.
RECIPE = re.compile(
    r"(?:python |accelerate launch (?:--config_file accelerate_configs/(\w+)\.yaml )?)?recipes/(\w+)\.py"
)


def show_help(module: str, command: str) -> None:
    """Print the kept page and exit, where the command line asks a script for help; else do nothing.

    Scripts call it before the imports that take seconds.

    Args:
        module: ``__name__`` of the caller; nothing is done unless it is the script that runs.
        command: name of the command, such as ``distill``.
    """
    if module == "__main__" and {"-h", "--help"} & {*sys.argv[1:]}:
        print(as_launched((PAGES / f"{command}.txt").read_text(), command), end="")
        raise SystemExit(0)


def as_launched(page: str, command: str) -> str:
    """A page for whoever started the command: a script of a clone is launched by ``accelerate launch``."""
    if not os.environ.get("COSS_HF_COMMAND"):
        for name in LAUNCH_OPTIONS:
            page = re.sub(rf"  --{name} .*\n(?: {{{INDENT}}}.*\n)*", "", page)
    return page.replace(f"coss-hf {command}", command_to(command))


def render(command: str, document: str, dataclass_types: Iterable[type], everything: bool = False) -> str:
    """Draw the help page of a command.

    Args:
        command: name of the command, such as ``distill``.
        document: docstring of its script.
        dataclass_types: what its options are fields of.
        everything: whether all options are shown, instead of those in ``options.GROUPS``.
    """
    document = re.sub(r"(?<=\S)  +", " ", as_commands(document))  # line continuations
    title, _, rest = document.strip().partition("\n\n")
    blocks = [f"usage: coss-hf {command} [--option value ...]", title]
    groups = _groups(command, dataclass_types, everything)
    blocks += [f"{group}:\n" + "\n".join(rows) for group, rows in groups.items()]
    blocks.append(rest.rstrip())
    if not everything and groups != _groups(command, dataclass_types, True):
        blocks.append(f"All options: coss-hf {command} --help_all")
    return "\n\n".join(blocks) + "\n"


def as_commands(document: str) -> str:
    """A docstring of a script, in which scripts are called by the names of their commands."""
    return RECIPE.sub(_as_command, document)


def own_help(kind: type, field: dataclasses.Field) -> str:
    """The help of an option: what a class of the project says of it, else the sentence in ``options.SENTENCES``.

    Args:
        kind: dataclass whose field it is; its base may be ``transformers.TrainingArguments``.
        field: the option.
    """
    declaring = next(base for base in kind.__mro__ if field.name in base.__dict__.get("__annotations__", {}))
    text = field.metadata.get("help") or ""
    if declaring.__module__.startswith("transformers.") or not text:
        text = SENTENCES.get(field.name) or text
    return text


def _as_command(found: re.Match) -> str:
    config = f" --accelerate_config {found[1]}" if found[1] else ""
    return f"coss-hf {found[2].replace('_', '-')}{config}"


def _groups(command: str, dataclass_types: Iterable[type], everything: bool) -> dict[str, list[str]]:
    """Lines of each group of options."""
    kinds = {"config": "FILE", **(LAUNCH_OPTIONS if command in LAUNCHED else {})}
    fields: dict[str, dataclasses.Field | None] = dict.fromkeys(kinds)
    texts = {name: SENTENCES[name] for name in kinds}
    hidden = {*NOT_OFFERED, *NOT_READ.get(command, ())}
    own = []
    shared = {name for names in GROUPS.values() for name in names}
    # What a command declares itself under a name of these groups is something else there: `--seed` of an evaluation.
    of_training = {name for title in TRAINING_GROUPS for name in GROUPS[title]}
    for kind in dataclass_types:
        found = {field.name: field for field in dataclasses.fields(kind) if field.init}
        fields |= found
        texts |= {name: own_help(kind, field) for name, field in found.items()}
        declared = kind.__dict__.get("__annotations__", {})
        is_training = kind.__name__ == "TeacherArguments"
        if is_training or not kind.__module__.startswith("coss_hf.trainer"):
            elsewhere = hidden | (shared if is_training else shared - of_training)
            own += [name for name in found if name in declared and name not in elsewhere]
    texts |= {name: COMMAND_SENTENCES[command, name] for name in fields if (command, name) in COMMAND_SENTENCES}
    groups = {"Options of this command": own}
    groups |= {title: [name for name in names if name not in own] for title, names in GROUPS.items()}
    if everything:
        seen = {name for names in groups.values() for name in names}
        groups["All other options"] = [name for name in fields if name not in seen | hidden]
    lines = {
        title: [
            _row(name, fields[name], texts[name], kinds.get(name))
            for name in names
            if name in fields and name not in hidden
        ]
        for title, names in groups.items()
    }
    return {title: rows for title, rows in lines.items() if rows}


def _row(name: str, field: dataclasses.Field | None, text: str, kind: str | None = None) -> str:
    """One option: its name and kind of value, then its sentence and its default."""
    option = f"  --{name} {_kind(field) if kind is None else kind}".rstrip()
    text = _sentence(text)
    if field is not None:
        text += _default(field, text)
    lines = textwrap.wrap(text, WIDTH - INDENT)
    if len(option) < INDENT - 1 and lines:
        lines[0] = option.ljust(INDENT) + lines[0]
        return "\n".join([lines[0], *(" " * INDENT + line for line in lines[1:])])
    return "\n".join([option, *(" " * INDENT + line for line in lines)])


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if not text or text.endswith(".") else f"{text}."


def _kind(field: dataclasses.Field) -> str:
    """The value that an option takes, in capitals, or its choices."""
    if field.metadata.get("choices"):
        return "{" + ",".join(map(str, field.metadata["choices"])) + "}"
    kinds = [kind for kind in _flattened(field.type) if kind is not type(None)]
    if any(kind is bool for kind in kinds) and len(kinds) == 1:
        return ""
    if any(get_origin(kind) is list for kind in kinds):
        return "VALUE ..."
    for kind, name in ((float, "NUMBER"), (int, "N")):
        if kind in kinds:
            return name
    return "FOLDER" if field.name.endswith("_dir") else "VALUE"


def _flattened(kind) -> list:
    """The kinds of a union, one level deep; the values of a ``Literal`` count as text."""
    if get_origin(kind) in (Union, UnionType):
        return [part for one in get_args(kind) for part in _flattened(one)]
    if get_origin(kind) is Literal:
        return [str]
    return [kind]


def _default(field: dataclasses.Field, text: str) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    if value is None or value is False or value == "" or value is dataclasses.MISSING or "default" in text.lower():
        return ""
    return f" Default: {str(value).lower() if value is True else value}."
