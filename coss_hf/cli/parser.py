"""Command lines and YAML files to dataclasses."""

import copy
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from coss_hf.cli.help import as_launched, render
from coss_hf.cli.options import DEFAULTS
from coss_hf.cli.paths import expand_word
from coss_hf.cli.shipped import find_yaml, folder
from coss_hf.study.single_run import refusal
from coss_hf.utils.messages import command_line, did_you_mean

# What other libraries call an argument.
OTHER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "workers": "dataloader_num_workers",
    "num_workers": "dataloader_num_workers",
    "optimizer": "optim",
    "scheduler": "lr_scheduler_type",
    "loss": "method",
    "k": "neighbors_k",
    "num_neighbors": "neighbors_k",
    "data": "dataset",
    "data_dir": "dataset",
    "train_dir": "dataset",
    "dataset_path": "dataset",
    "teacher_model": "teacher",
    "student_model": "student",
    "resume": "resume_from_checkpoint",
    "output": "output_dir",
}


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise ValueError(f"{message.replace('argument ', '')}; see --help.")

    @staticmethod
    def _parse_dataclass_field(parser, field):
        # The original writes into the class that an option of `int | None` is an int.
        HfArgumentParser._parse_dataclass_field(parser, copy.copy(field))


@command_line()
def parse(dataclass_types, argv: list[str] | None = None, single_run: Sequence[str] = (), command: str = "") -> tuple:
    """Parse ``--config FILE.yaml`` and the command line, which overrides the file, to dataclasses.

    Args:
        dataclass_types: one dataclass or several.
        argv: the command line's words; by default ``sys.argv[1:]``.
        single_run: names of options that the dataclasses have and the command, a study, does not take. Errors about
            them say so: none of their values is right.
        command: name of the command, where it has ``options.DEFAULTS`` of its own.

    Raises:
        ValueError: unknown keys (similar ones are suggested), values of the wrong type, unreadable files.
        SystemExit: ``--help`` or ``--help_all``, whose page has been printed.
    """
    _answer_help(dataclass_types, sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclass_types, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS.get(command, {}))
    parser.add_argument("--config", help="YAML file of these arguments; the command line overrides it.")
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    argv = _bare_resume(list(sys.argv[1:] if argv is None else argv))
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv.count("--config") > 1:
        raise ValueError("--config was given twice: give one file, and the other options on the command line.")
    if "--config" in argv:
        position = argv.index("--config")
        path = [expand_word(word, "--config") for word in argv[position + 1 : position + 2]]
        argv = _yaml_arguments(path, known, single_run) + argv[:position] + argv[position + 2 :]
    argv = [expand_word(word) for word in argv]
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    except ValueError as error:
        words = {word.split("=")[0] for word in argv}
        for name in single_run:
            if f"--{name}" in words and f"--{name}" in str(error):
                raise ValueError(refusal(name)) from error
        raise
    for word in unknown:
        close = _meant(word.lstrip("-").split("=")[0], known, single_run)
        hint = did_you_mean(f"--{name}" for name in close) or " See --help."
        raise ValueError(f"{word} is no argument of this command.{hint}")
    return tuple(parsed)


def _meant(name: str, known: set[str], single_run: Sequence[str]) -> list[str]:
    """Names of arguments that an unknown name may mean, the most likely first; a study has others than a run."""
    known = known - {*single_run} - ({"method"} if single_run else set())
    if name == "loss" and "methods" in known:
        return ["methods"]
    if name in OTHER_NAMES:
        return [OTHER_NAMES[name]] if OTHER_NAMES[name] in known else []
    from coss_hf.trainer.given_arguments import UNUSED  # imports torch

    return difflib.get_close_matches(name, {one for one in known if "-" not in one} - {*UNUSED}, n=2)


def _answer_help(dataclass_types, argv: list[str]) -> None:
    """Print all options with ``--help_all``; the page of ``--help`` is printed before this module is imported."""
    asked = {"-h", "--help", "--help_all"} & {*argv}
    if asked:
        command = Path(sys.argv[0]).stem.replace("_", "-")
        document = getattr(sys.modules["__main__"], "__doc__", None) or ""
        print(
            as_launched(render(command, document, dataclass_types, everything="--help_all" in asked), command), end=""
        )
        raise SystemExit(0)


def _bare_resume(argv: list[str]) -> list[str]:
    """``--resume_from_checkpoint`` without a value means ``auto``."""
    flag = "--resume_from_checkpoint"
    if flag in argv:
        after = argv.index(flag) + 1
        if after == len(argv) or argv[after].startswith("--"):
            argv.insert(after, "auto")
    return argv


def _yaml_arguments(path: list[str], known: set[str], single_run: Sequence[str]) -> list[str]:
    """A YAML file as command-line words: typed and checked like them."""
    content = _read_yaml(path)
    wrong = [key for key in content if key not in known or key == "config"]
    if wrong:
        listed = ", ".join(
            f"{key!r}"
            + (f" (did you mean {' or '.join(close)}?)" if (close := _meant(str(key), known, single_run)) else "")
            for key in wrong
        )
        are = "is no argument" if len(wrong) == 1 else "are no arguments"
        raise ValueError(f"--config {path[0]}: {listed} {are} of this command.")
    return [word for key, value in content.items() if value is not None for word in _words(key, value)]


def _read_yaml(path: list[str]) -> dict:
    file = find_yaml("".join(path), folder("recipes") / "configs", "--config")
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path[0]} is not valid YAML: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path[0]} cannot be read ({error}); give a readable file of text.") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path[0]} must contain `argument: value` lines.")
    return content


def _words(key: str, value) -> list[str]:
    """Command-line words of one entry of a YAML file."""
    if key == "student_config_overrides" and isinstance(value, dict):
        value = [f"{name}={json.dumps(entry)}" for name, entry in value.items()]
    if key == "method" and isinstance(value, list):
        value = " + ".join(_method(entry) for entry in value)
    if isinstance(value, bool):
        # YAML reads a bare `no` as false, which --eval_strategy and its like spell "no".
        is_choice = key.endswith("_strategy")
        return [f"--{key}", "no" if is_choice and not value else str(value).lower()]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    return [f"--{key}={value}"]


def _method(entry: str | dict) -> str:
    """``{name: rkd, beta: 2}`` as ``rkd(beta=2)``."""
    if not isinstance(entry, dict):
        return str(entry)
    if "name" not in entry:
        raise ValueError(f"method: {entry} names no method; write {{name: rkd, beta: 2}}.")
    options = ", ".join(f"{key}={value}" for key, value in entry.items() if key != "name")
    return f"{entry['name']}({options})"
