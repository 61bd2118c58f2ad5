"""Teachers of a study that are trained first."""

import json
import multiprocessing
import runpy
import shutil
import sys
import threading
from dataclasses import fields
from pathlib import Path

from coss_hf.config import DataArguments
from coss_hf.models.classifier import load_classifier
from coss_hf.study.paper import EPOCHS, MILESTONES
from coss_hf.study.sweep import end_with_parent


def untrained(name: str, folder: Path) -> str:
    """Saves a CIFAR network at random weights: whether methods can run with it is known before it is trained."""
    for part in load_classifier(name, ["0", "1"]):
        part.save_pretrained(folder)
    return str(folder)


def train(recipe: Path, folders: list[Path], data: DataArguments, epochs: int, options: dict) -> None:
    """Trains those that are not there yet, each in a folder of its name, on the training images.

    One that was stopped goes on from its own checkpoint.

    Args:
        recipe: path of ``recipes/train_teacher.py``.
        epochs: after the paper's shares of them the rate falls tenfold.
        options: other arguments of the recipe.

    Raises:
        SystemExit: it failed, and said why.
    """
    given = {"num_train_epochs": epochs, "save_strategy": "steps", "save_total_limit": 1} | options
    given |= {f.name: getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != f.default}
    drops = ["--lr_milestones", *(str(epochs * drop / EPOCHS) for drop in MILESTONES)]
    for folder in folders:
        if (folder / "run.json").exists():
            continue
        named = {"model": folder.name, "output_dir": folder} | given
        words = [f"--{key}={value}" for key, value in named.items() if value is not None]
        words += [*drops, "--overwrite_output_dir", "--resume_from_checkpoint"]
        # A process that dies with this one, and with a memory of its own.
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(str(recipe), words))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _run(recipe: str, words: list[str]) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.argv = [recipe, *words]
    runpy.run_path(recipe, run_name="__main__")


def describe(folder: Path, epochs: int) -> str:
    """What a table says of a teacher that was trained for it."""
    accuracy = json.loads((folder / "run.json").read_text()).get("accuracy")
    return f"Its teacher was trained first, for {epochs} epochs of the same images" + (
        f": {100 * accuracy:.1f} % of test images right." if accuracy is not None else "."
    )
