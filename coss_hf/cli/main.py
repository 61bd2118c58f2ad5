"""The command `coss-hf`: each of its commands is a recipe, started in this process or by accelerate in several."""

import contextlib
import difflib
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import coss_hf
from coss_hf.cli.options import LAUNCHED, STUDIES
from coss_hf.cli.shipped import find_yaml, folder
from coss_hf.reporting.run_record import hide_secrets
from coss_hf.utils.messages import did_you_mean

COMMANDS = {
    "distill": "Distil a teacher into a student, without labels.",
    "neighbors": "Find each training image's nearest neighbours and keep them with the images.",
    "evaluate": "Measure a teacher, a student and random weights on held-out images.",
    "prepare": "Copy photographs at a smaller size, for repeated runs.",
    "embed": "Embed a folder or dataset of images with any vision network.",
    "compare": "Rank methods at equal images seen, with several seeds.",
    "report": "Report whether distillation helped, and what it saved, on one page.",
    "reproduce": "Reproduce the tables of the CoSS paper on your images.",
    "export": "Export a student to ONNX (in int8 as well on request), OpenVINO or ExecuTorch.",
    "push": "Push a student or a dataset with neighbours to the Hub.",
    "train-teacher": "Train a supervised teacher on labelled images.",
    "convert": "Convert a CIFAR-10 checkpoint to a Transformers model.",
    "quickstart": "Train a teacher and its student on digits, in minutes on a CPU.",
    "env": "Print versions and devices, for bug reports.",
}
USAGE = "usage: coss-hf COMMAND [--num_processes N] [--accelerate_config FILE] [--option value ...]"


def main(argv: list[str] | None = None) -> None:
    """Run ``coss-hf COMMAND ...``.

    ``--num_processes N`` starts N processes on this machine; ``--accelerate_config`` names a file of ``accelerate
    config``, or one that comes with the package (``multi_gpu``, ``fsdp``, ...).

    Args:
        argv: words of the command line; by default those of this process.

    Raises:
        SystemExit: with the exit code of the command; 2 for words that it does not know.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return
    if argv[0] in ("-V", "--version"):
        print(f"coss-hf {coss_hf.__version__}")
        return
    command = argv.pop(0)
    if command not in COMMANDS:
        hint = did_you_mean(difflib.get_close_matches(command, COMMANDS, n=1))
        _fail(f"{command!r} is no command of coss-hf.{hint} See coss-hf --help.")
    if command == "env":
        from coss_hf.cli.environment import environment

        print(environment())
        return
    os.environ["COSS_HF_COMMAND"] = shlex.join(["coss-hf", command, *hide_secrets(argv)])
    processes, config, argv = _launch_options(argv)
    if {"-h", "--help", "--help_all"} & {*argv} or (processes is None and config is None):
        run_recipe(command, argv)
    elif command not in LAUNCHED:
        instead = " --jobs trains several of its students in parallel." if command in STUDIES else ""
        _fail(f"coss-hf {command} runs in one process; leave out --num_processes and --accelerate_config.{instead}")
    else:
        launch(command, argv, processes, config)


def overview() -> str:
    """The page of ``coss-hf --help``."""
    rows = [f"  {name:<16}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            USAGE,
            "",
            "Make a big vision backbone small, without labels.",
            "",
            "commands:",
            *rows,
            "",
            "coss-hf COMMAND --help describes a command.",
        ]
    )


def recipe_path(command: str) -> Path:
    """The script of a command."""
    return folder("recipes") / f"{command.replace('-', '_')}.py"


def run_recipe(command: str, argv: list[str]) -> None:
    """Run a recipe in this process, as ``python recipes/...`` does."""
    path = recipe_path(command)
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")


def launch(command: str, argv: list[str], processes: int | None, config: str | None) -> None:
    """Start a recipe by ``accelerate launch``."""
    words = []
    if config is not None:
        try:
            words += ["--config_file", str(find_yaml(config, folder("accelerate_configs"), "--accelerate_config"))]
        except ValueError as error:
            _fail(str(error))
    if processes is not None:
        words += ["--num_processes", str(processes)]
        if config is None:
            words += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            words += ["--multi_gpu"] if processes > 1 else []
    if "--use_cpu" in argv:
        # Without it accelerate would start processes that do not know each other.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from accelerate.commands.launch import launch_command, launch_command_parser

    arguments = launch_command_parser().parse_args([*words, str(recipe_path(command)), *argv])
    with _exit_code_of_processes():
        launch_command(arguments)


@contextlib.contextmanager
def _exit_code_of_processes():
    """End with the code of the processes, which have told why, instead of the launcher's traceback."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        yield
    except SignalException as error:
        code = 128 + error.sigval
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:  # of one process
        code = error.returncode
    else:
        return
    raise SystemExit(128 - code if code < 0 else code)


def _launch_options(argv: list[str]) -> tuple[int | None, str | None, list[str]]:
    """Number of processes, accelerate's configuration, and all other words."""
    found = {"--num_processes": None, "--accelerate_config": None}
    rest = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in found:
            rest.append(word)
            continue
        found[name] = value if equals else next(words, "")
    processes, config = found.values()
    if processes is not None and not (processes.isdigit() and int(processes) > 0):
        _fail(f"--num_processes {processes}: give a whole number, 1 or more.")
    return int(processes) if processes else None, config, rest


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
