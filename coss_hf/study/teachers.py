"""Teachers that a study trains first."""

import json
import logging
import multiprocessing
import shlex
import shutil
import threading
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from transformers import PreTrainedModel

from coss_hf.models.cifar.classifier import load_classifier
from coss_hf.models.cifar.registry import CIFAR_NETWORKS, cifar_config
from coss_hf.neighbors.options import SearchOptions
from coss_hf.reporting.run_record import write_json
from coss_hf.study.paper_tables import EPOCHS, MILESTONES
from coss_hf.study.sweep import end_with_parent
from coss_hf.study.trials import OPERATION_OF_DATA
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.supervised import TeacherArguments, build_supervised_run
from coss_hf.utils.errors import bad_input_exits
from coss_hf.utils.messages import command_to
from coss_hf.utils.paths import same_place

# File of the arguments that a teacher was trained with, written before it is trained.
TRAINED_WITH = "asked.json"
# Arguments of the images that change no teacher.
NO_MATTER = {*OPERATION_OF_DATA, *(option.name for option in fields(SearchOptions))}


def save_untrained(name: str, folder: Path) -> str:
    """Save a CIFAR network at random weights, to find out whether methods can run with it before it is trained.

    Args:
        name: name of the network.
        folder: folder to write.

    Returns:
        The folder.
    """
    for part in load_classifier(name, ["0", "1"]):
        part.save_pretrained(folder)
    return str(folder)


def name_of_another(name: str, network: PreTrainedModel) -> str:
    """Return the name of a network that is not the one of that name; empty where it is.

    Args:
        name: name of a CIFAR network.
        network: the network, with a classifier or without.
    """
    config = network.config
    for one in [name, *CIFAR_NETWORKS]:
        expected = cifar_config(one)
        shape = [key for key in ("depth", "layers_per_stage", "stem_width", "hidden_sizes") if hasattr(expected, key)]
        if expected.model_type == getattr(config, "model_type", None) and all(
            _as_list(getattr(config, key, None)) == _as_list(getattr(expected, key)) for key in shape
        ):
            return "" if one == name else one
    return type(network).__name__


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value


def _trained_with(data: DataArguments, epochs: int, options: dict) -> dict:
    """Return the arguments that decide a teacher's weights."""
    return {
        "num_train_epochs": epochs,
        "lr_milestones": [epochs * drop / EPOCHS for drop in MILESTONES],
        "per_device_train_batch_size": options["per_device_train_batch_size"],
        "bf16": options["bf16"],
        **_changed(data),
    }


def _changed(data: DataArguments) -> dict:
    """Return the arguments that differ from their defaults."""
    return {f.name: getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != f.default}


def check(folders: Iterable[Path], data: DataArguments, epochs: int, options: dict) -> None:
    """Check that teachers which are there, finished or not, were trained with the same arguments.

    Args:
        folders: see ``train``.
        data: see ``train``.
        epochs: see ``train``.
        options: see ``train``.

    Raises:
        ValueError: they were not; the message names what differs.
    """
    wanted = _trained_with(data, epochs, options)
    for folder in folders:
        path = folder / TRAINED_WITH
        found = json.loads(path.read_text()) if path.exists() else wanted
        differ = [name for name in {**found, **wanted} if _differs(name, found.get(name), wanted.get(name))]
        if differ:
            named = ", ".join(f"{name} {found.get(name)}, not {wanted.get(name)}" for name in differ)
            raise ValueError(
                f"--output_dir: its teacher {folder} was trained with {named}; give another folder, or remove that one."
            )


def _differs(name: str, one, other) -> bool:
    """Whether two values of an argument make two teachers."""
    if name == "dataset":
        return not same_place(one, other)
    return name not in NO_MATTER and one != other


def train(folders: Iterable[Path], data: DataArguments, epochs: int, options: dict) -> None:
    """Train the teachers that are not there yet, each in its folder, on the training images.

    One that was stopped is resumed from its own checkpoint.

    Args:
        folders: folders of the teachers; the last part of each is the name of a CIFAR network.
        data: the images.
        epochs: passes over the images; the learning rate falls tenfold after the paper's shares of them.
        options: other fields of ``TeacherArguments``; those that are None are left out.

    Raises:
        SystemExit: training failed, and the reason was printed.
    """
    trained_with = _trained_with(data, epochs, options)
    for folder in folders:
        if not (folder / "run.json").exists():
            write_json(folder / TRAINED_WITH, trained_with)
            arguments = {
                "save_strategy": "steps",
                "save_total_limit": 1,
                **options,
                "num_train_epochs": epochs,
                "lr_milestones": trained_with["lr_milestones"],
                "model": folder.name,
                "output_dir": str(folder),
                "overwrite_output_dir": True,
            }
            _train_in_process(data, {name: value for name, value in arguments.items() if value is not None})
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _train_in_process(data: DataArguments, arguments: dict) -> None:
    """Train one teacher in a process that ends with this one and has a memory of its own."""
    process = multiprocessing.get_context("spawn").Process(target=_train_one, args=(data, arguments))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(max(process.exitcode, 1))


def _train_one(data: DataArguments, arguments: dict) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        run = build_supervised_run(data, TeacherArguments(**arguments, resume_from_checkpoint="auto"))
    run.train(launched_as=_command(data, arguments))


def _command(data: DataArguments, arguments: dict) -> str:
    """Return the command that trains the same teacher, for its record."""
    words = shlex.split(command_to("train-teacher"))
    for name, value in {**_changed(data), **arguments}.items():
        words.append(f"--{name}")
        words += map(str, value if isinstance(value, list) else [value])
    return shlex.join(words)


def describe(folder: Path) -> str:
    """Return a sentence on a teacher that was trained for a table."""
    epochs = json.loads((folder / TRAINED_WITH).read_text())["num_train_epochs"]
    accuracy = json.loads((folder / "run.json").read_text()).get("accuracy")
    measured = "" if accuracy is None else f": {100 * accuracy:.1f} % of test images right"
    return f"Its teacher was trained first, for {epochs} epochs{measured}."
