"""Each library gives a student's embedding in a fresh environment that has what the card names, and nothing else.

An environment with everything hides a package that the card forgot. This test installs, for each of the card's codes,
the packages of its "Needs" sentence, and runs it as it stands. It needs a network:

    pytest -m slow tests/hub/test_environments.py -s
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

import coss_hf
from coss_hf.hub import export as exporting
from coss_hf.hub.export_folders import RECORD, weights_digest
from coss_hf.hub.snippets import Subject, usage
from coss_hf.hub.student import Student
from tests.helpers.exported import picture_of
from tests.hub.test_loaders import CASES, student

STUDENTS = ("cifar", "vit", "dinov2", "timm resnet", "torchvision")
EXPORTS = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}
TITLES = {
    "Transformers": None,
    "Pipeline": None,
    "sentence-transformers": None,
    "timm": None,
    "PyTorch": None,
    "ONNX Runtime": "onnx",
    "Optimum": "onnx",
    "OpenVINO": "openvino",
    "ExecuTorch": "executorch",
}
NEEDS = re.compile(r"Needs ((?:`[^`]+`(?:, | and )?)+)")

# Runs a code, and prints the least cosine of its `embedding` to what is expected, and the packages that are there.
PROGRAM = """
import importlib.metadata as metadata, json, sys
code, expected = sys.argv[1:]
names = {}
exec(open(code).read(), names)
import numpy
given = numpy.asarray(names["embedding"], dtype="float64")
wanted = numpy.asarray(json.load(open(expected)))
assert given.shape == wanted.shape, (given.shape, wanted.shape)
cosines = (given * wanted).sum(1) / numpy.linalg.norm(given, axis=1) / numpy.linalg.norm(wanted, axis=1)
found = {one.metadata["Name"]: one.version for one in metadata.distributions()}
print("FOUND", json.dumps({"cosine": float(cosines.min()), "packages": found}))
"""


class Made(NamedTuple):
    """A saved student with its exported files, its card, and its embeddings of a picture."""

    folder: Path
    card: str
    own: Tensor
    teacher: Tensor


def save(name: str, place: Path) -> Made:
    made = student(CASES[name], place / "published")
    folder = place / "student"
    made.save_pretrained(folder)
    if "PyTorch" not in CASES[name].loaders:
        write_exports(made, folder)
    picture = picture_of(made)
    picture.save(place / "photo.png")
    own, teacher = coss_hf.embed(made.backbone, [picture]), made.encode([picture])
    return Made(folder, usage(Subject(folder.name, made.backbone, made.head, folder, on_hub=False)), own, teacher)


def write_exports(made: Student, folder: Path) -> None:
    """Export, as ``coss-hf export --head`` does, to each format whose package is here."""
    images = made.backbone.processor(picture_of(made), return_tensors="pt")["pixel_values"]
    formats = [name for name, package in EXPORTS.items() if importlib.util.find_spec(package)]
    exporting.export(made, folder, images=[images], rounds=1, formats=formats, hub_layout=True)
    for name in formats:
        (folder / name / RECORD).write_text(json.dumps({"weights": weights_digest(folder), "head": True}))


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, Made]:
    place = tmp_path_factory.mktemp("students")
    return {name: save(name, place / name.replace(" ", "-")) for name in STUDENTS}


@pytest.fixture(scope="module")
def environments(tmp_path_factory):
    """A function from names of packages to the Python of an environment that has them alone."""
    place = tmp_path_factory.mktemp("environments")
    made = {}

    def environment(packages: frozenset[str]) -> Path:
        if packages not in made:
            folder = place / str(len(made))
            python = folder / "bin" / "python"
            uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
            install = [uv, "pip", "install", "-q", "-p", python] if uv else [python, "-m", "pip", "install", "-q"]
            run([uv, "venv", "-q", "-p", sys.executable, folder] if uv else [sys.executable, "-m", "venv", folder])
            run([*install, *sorted(packages)])
            made[packages] = python
        return made[packages]

    return environment


def run(command: list, **options) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def parts(made: Made, title: str) -> tuple[frozenset[str], str] | None:
    """The packages that the card names for a library, and its code; None where the card has none."""
    found = re.search(rf"### {re.escape(title)}\n\n(.*?)\n\n```python\n(.*?)```", made.card, re.DOTALL)
    if found is None:
        return None
    return frozenset(re.findall(r"`([^`]+)`", NEEDS.match(found[1])[1])), found[2]


@pytest.mark.slow
@pytest.mark.parametrize("title", TITLES)
def test_what_the_card_names_is_enough(students, environments, title):
    if TITLES[title] and not importlib.util.find_spec(EXPORTS[TITLES[title]]):
        pytest.skip(f"needs {EXPORTS[TITLES[title]]}, to export")
    shown = {name: parts(made, title) for name, made in students.items()}
    shown = {name: part for name, part in shown.items() if part}
    assert shown
    for name, (packages, code) in shown.items():
        made = students[name]
        place = made.folder.parent
        opened = 'image = Image.open("photo.png").convert("RGB")'
        (place / "code.py").write_text(re.sub(r"(?m)^image = .*", opened, code))
        expected = made.teacher if title == "sentence-transformers" or TITLES[title] else made.own
        (place / "expected.json").write_text(json.dumps(expected.tolist()))
        printed = run([environments(packages), "-c", PROGRAM, "code.py", "expected.json"], cwd=place)
        found = json.loads(printed.split("FOUND")[1])
        versions = " ".join(f"{one} {found['packages'].get(one, '?')}" for one in sorted(map(bare, packages)))
        print(f"{title}, {name}: cosine {found['cosine']:.7f}; {versions}")
        assert "coss-hf" not in found["packages"]
        assert found["cosine"] >= 0.9999


def bare(requirement: str) -> str:
    """A requirement without its version and extras."""
    return re.match(r"[\w-]+", requirement)[0]
