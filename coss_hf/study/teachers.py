"""Teachers of a study that are trained first."""

import json
import logging
import multiprocessing
import shlex
import shutil
import threading
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from coss_hf.models.cifar.classifier import load_classifier
from coss_hf.reporting.run_record import write_json
from coss_hf.study.paper_tables import EPOCHS, MILESTONES
from coss_hf.study.sweep import end_with_parent
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.supervised import TeacherArguments, build_supervised_run
from coss_hf.utils.errors import bad_input_exits

ASKED = "asked.json"  # what a teacher was trained with, written before it is


def untrained(name: str, folder: Path) -> str:
    """Saves a CIFAR network at random weights: whether methods can run with it is known before it is trained."""
    for part in load_classifier(name, ["0", "1"]):
        part.save_pretrained(folder)
    return str(folder)


def _asked(data: DataArguments, epochs: int, options: dict) -> dict:
    """What decides a teacher's weights, as arguments of the recipe."""
    found = {"num_train_epochs": epochs, "lr_milestones": [epochs * drop / EPOCHS for drop in MILESTONES]}
    found |= {name: options[name] for name in ("per_device_train_batch_size", "bf16")}
    return found | {f.name: getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != f.default}


def check(folders: Iterable[Path], data: DataArguments, epochs: int, options: dict) -> None:
    """Refuses teachers, finished or not, that were asked for otherwise; arguments as of ``train``.

    Raises:
        ValueError: naming what differs.
    """
    asked = _asked(data, epochs, options)
    for folder in folders:
        path = folder / ASKED
        if path.exists() and (before := json.loads(path.read_text())) != asked:
            differ = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
            named = ", ".join(f"{name} {before.get(name)}, not {asked.get(name)}" for name in differ)
            raise ValueError(
                f"--output_dir: its teacher {folder} was trained with {named}; give another folder, or remove that one."
            )


def train(folders: Iterable[Path], data: DataArguments, epochs: int, options: dict) -> None:
    """Train those that are not there yet, each in a folder of its name, on the training images.

    One that was stopped is resumed from its own checkpoint.

    Args:
        folders: of the teachers; the last part is the name of a CIFAR network.
        data: the images.
        epochs: after the paper's shares of them the rate falls tenfold.
        options: other fields of ``TeacherArguments``; None: left out.

    Raises:
        SystemExit: it failed, and said why.
    """
    asked = _asked(data, epochs, options)
    for folder in folders:
        if not (folder / "run.json").exists():
            write_json(folder / ASKED, asked)
            training = {"save_strategy": "steps", "save_total_limit": 1} | options
            training |= {name: asked[name] for name in ("num_train_epochs", "lr_milestones")}
            training |= {"model": folder.name, "output_dir": str(folder), "overwrite_output_dir": True}
            training = {name: value for name, value in training.items() if value is not None}
            # A process that dies with this one, and with a memory of its own.
            process = multiprocessing.get_context("spawn").Process(target=_train_one, args=(data, training))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(max(process.exitcode, 1))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _train_one(data: DataArguments, training: dict) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        run = build_supervised_run(data, TeacherArguments(**training, resume_from_checkpoint="auto"))
    run.train(launched_as=_command(data, training))


def _command(data: DataArguments, training: dict) -> str:
    """The command that does the same, for the teacher's record."""
    given = {f.name: getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != f.default} | training
    words = ["python", "recipes/train_teacher.py"]
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def describe(folder: Path) -> str:
    """What a table says of a teacher that was trained for it."""
    epochs = json.loads((folder / ASKED).read_text())["num_train_epochs"]
    accuracy = json.loads((folder / "run.json").read_text())["accuracy"]
    return f"Its teacher was trained first, for {epochs} epochs: {100 * accuracy:.1f} % of test images right."
