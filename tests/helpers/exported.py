"""Exported students with their card's code, for readers that need a program or an environment of their own."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from coss_hf.hub.export import write_graph
from coss_hf.hub.export_folders import RECORD, weights_digest
from coss_hf.hub.snippets import Subject, usage
from coss_hf.hub.student import Student
from coss_hf.models.image_processor import noise_image


def export(made: Student, folder: Path, write: Callable[[Student, Path], None] = write_graph) -> None:
    """Save a student with its ONNX file, as ``coss-hf export --head`` leaves them."""
    made.save_pretrained(folder)
    (folder / "onnx").mkdir()
    write(made, folder / "onnx" / "model.onnx")
    record = {"weights": weights_digest(folder), "head": made.head is not None}
    (folder / "onnx" / RECORD).write_text(json.dumps(record))


def card(made: Student, folder: Path) -> str:
    """Return the section on use of the card of an exported student."""
    return usage(Subject(folder.name, made.backbone, made.head, folder))


def code_of_card(title: str, made: Student, folder: Path) -> str:
    """Return the code under a title of that section."""
    return re.search(rf"### {re.escape(title)}\n.*?```\w+\n(.*?)```", card(made, folder), re.DOTALL)[1]


def picture_of(made: Student) -> Image.Image:
    """Return a picture of the student's own size: what resizes it in another way gives another embedding."""
    return noise_image(10, 8).resize(made.backbone.size[::-1], Image.Resampling.BICUBIC)
