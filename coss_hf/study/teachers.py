"""Teachers of a study that are trained first."""

import json
import multiprocessing
import runpy
import shutil
import sys
import threading
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from coss_hf.models.cifar.classifier import load_classifier
from coss_hf.reporting.run_record import write_json
from coss_hf.study.paper_tables import EPOCHS, MILESTONES
from coss_hf.study.sweep import end_with_parent
from coss_hf.trainer.arguments import DataArguments

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


def train(recipe: Path, folders: Iterable[Path], data: DataArguments, epochs: int, options: dict) -> None:
    """Trains those that are not there yet, each in a folder of its name, on the training images.

    One that was stopped goes on from its own checkpoint.

    Args:
        recipe: path of ``recipes/train_teacher.py``.
        data: the images.
        epochs: after the paper's shares of them the rate falls tenfold.
        options: other arguments of the recipe.

    Raises:
        SystemExit: it failed, and said why.
    """
    asked = _asked(data, epochs, options)
    given = {"save_strategy": "steps", "save_total_limit": 1} | options | asked
    drops = ["--lr_milestones", *map(str, given.pop("lr_milestones"))]
    for folder in folders:
        if not (folder / "run.json").exists():
            write_json(folder / ASKED, asked)
            named = {"model": folder.name, "output_dir": folder} | given
            words = [f"--{key}={value}" for key, value in named.items() if value is not None]
            words += [*drops, "--overwrite_output_dir", "--resume_from_checkpoint"]
            # A process that dies with this one, and with a memory of its own.
            process = multiprocessing.get_context("spawn").Process(target=_run, args=(str(recipe), words))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(max(process.exitcode, 1))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _run(recipe: str, words: list[str]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = [recipe, *words]
    runpy.run_path(recipe, run_name="__main__")


def describe(folder: Path) -> str:
    """What a table says of a teacher that was trained for it."""
    epochs = json.loads((folder / ASKED).read_text())["num_train_epochs"]
    accuracy = json.loads((folder / "run.json").read_text())["accuracy"]
    return f"Its teacher was trained first, for {epochs} epochs: {100 * accuracy:.1f} % of test images right."
