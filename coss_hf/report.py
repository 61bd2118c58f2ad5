"""What a run leaves on disk beside the student: its record and its pictures."""

import json
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from coss_hf.decoding import decode
from coss_hf.evaluation import nearest
from coss_hf.plots import loss_curve, neighbor_picture


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on."""
    return {name: version(name) for name in ("torch", "torchvision", "transformers", "accelerate", "datasets")}


def command() -> str:
    """The command line, its secrets hidden."""
    words, hide = [], False
    for word in sys.argv:
        name, equals, _ = word.partition("=")
        secret = name.startswith("--") and name.endswith("token")
        words.append("***" if hide else f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    return shlex.join(words)


def write_json(path: str | Path, content: dict) -> None:
    """Writes a file that is whole or not there, folders included."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(unfinished, path)


def write_record(output_dir, trainer, results: dict, arguments: dict, splits) -> dict:
    """Writes ``run.json``, and returns it: command, arguments, what was resolved, images seen, results."""
    record = {
        "command": command(),
        "images_seen": trainer.images_seen,
        "teacher": repr(trainer.teacher),
        "student": repr(trainer.student),
        "results": results,
        "evaluated_on": "test" if splits.test is not None else "validation",
        "bad_images": splits.bad_images,
        "versions": versions(),
        "arguments": arguments,
    }
    write_json(Path(output_dir, "run.json"), record)
    return record


def write_pictures(output_dir, trainer, evaluator, queries: int = 8, neighbors: int = 6) -> None:
    """Writes ``loss.png`` and, with an evaluator, ``neighbors.png``."""
    if any("loss" in line for line in trainer.state.log_history):
        loss_curve(Path(output_dir, "loss.png"), trainer.state.log_history)
    if evaluator is None or len(evaluator.queries) <= neighbors + 1:
        return
    teacher = evaluator.teacher_queries
    student = evaluator.embed(trainer.student, evaluator.queries, "Picture")
    rows = np.linspace(0, len(teacher) - 1, queries).round().astype(int)
    found = []
    for embeddings in (student, teacher):
        _, candidates = nearest(embeddings[rows], embeddings, neighbors + 1)
        # The image itself is left out by its row: exact duplicates tie with it.
        found.append(
            np.array([[c for c in line if c != row][:neighbors] for line, row in zip(candidates.tolist(), rows)])
        )
    column = evaluator.queries[evaluator.image_column]
    images = {
        row: decode(column[row]) for row in {*rows.tolist(), *found[0].ravel().tolist(), *found[1].ravel().tolist()}
    }
    neighbor_picture(Path(output_dir, "neighbors.png"), images, rows.tolist(), *found)
