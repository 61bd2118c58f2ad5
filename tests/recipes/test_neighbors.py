import importlib.util
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
from filelock import FileLock

from coss_hf.data.loading import load_images
from coss_hf.neighbors.columns import check_neighbors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("neighbors_recipe", ROOT / "recipes" / "neighbors.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    folder = tmp_path_factory.mktemp("teacher")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def image_folder(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        for number in range(count):
            pixels = np.random.default_rng([count, number]).integers(0, 256, (20, 20, 3), dtype=np.uint8)
            place = tmp_path / "images" / split / "ab"[number % 2]
            place.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(place / f"{number}.png")
    return tmp_path / "images"


def run_recipe(recipe, monkeypatch, tmp_path, **arguments):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["neighbors.py", *words])
    recipe.main()


def test_recipe_writes_a_dataset_that_later_runs_can_read(recipe, teacher, image_folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    arguments = {"teacher": teacher, "dataset": image_folder, "neighbors_pool": 3, "output": output}
    run_recipe(recipe, monkeypatch, tmp_path, **arguments, validation_size=2)
    shutil.rmtree(image_folder)  # the bytes are in the output, not paths
    saved = datasets.load_from_disk(output)
    assert {name: len(split) for name, split in saved.items()} == {"train": 10, "validation": 2, "test": 4}
    saved._check_values_features()  # what push_to_hub asks first
    assert saved["train"][0]["image"].size == (20, 20)
    splits = load_images(str(output))
    assert check_neighbors(splits.train, 3).shape == (10, 3) and len(splits.test) == 4
    with pytest.raises(ValueError, match="^neighbors_k"):
        check_neighbors(load_images(str(output), max_train_samples=8).train, 3)


@pytest.mark.parametrize(
    "change, message",
    [({"neighbors_pool": 12}, "--neighbors_pool 12.*11 or fewer"), ({"output": "."}, "--output . exists")],
)
def test_recipe_refuses_bad_input(recipe, teacher, image_folder, tmp_path, monkeypatch, capsys, change, message):
    arguments = {"teacher": teacher, "dataset": image_folder, "output": tmp_path / "out"} | change
    with pytest.raises(SystemExit) as stop:
        run_recipe(recipe, monkeypatch, tmp_path, **arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_half_of_a_dataset(recipe, teacher, image_folder, tmp_path, monkeypatch, capsys):
    arguments = {"teacher": teacher, "dataset": image_folder, "neighbors_pool": 3, "output": tmp_path / "new" / "out"}

    def full(self, folder):
        folder.mkdir(parents=True)
        (folder / "dataset_dict.json").write_text("{")
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise ValueError("I/O operation on closed file")  # as pyarrow does

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(datasets.DatasetDict, "save_to_disk", full)
        run_recipe(recipe, patch, tmp_path, **arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and re.search("--output .*out could not be written.*No space.*same command", error)
    assert not any((tmp_path / "new").iterdir())
    run_recipe(recipe, monkeypatch, tmp_path, **arguments)
    assert (tmp_path / "new" / "out" / "neighbors.json").is_file()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("content", [True, False])
def test_what_came_to_be_at_the_output_is_not_replaced(
    recipe, teacher, image_folder, tmp_path, monkeypatch, capsys, content
):
    output = tmp_path / "new" / "out"
    save = datasets.DatasetDict.save_to_disk

    def meanwhile(self, folder):
        output.mkdir(parents=True)
        if content:
            (output / "work.txt").write_text("of somebody else")
        save(self, folder)

    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", meanwhile)
    arguments = {"teacher": teacher, "dataset": image_folder, "neighbors_pool": 3, "output": output}
    if content:
        with pytest.raises(SystemExit) as stop:
            run_recipe(recipe, monkeypatch, tmp_path, **arguments)
        assert stop.value.code == 1
        assert re.search("--output .*out was not there .*another --output.*kept in the cache", capsys.readouterr().err)
        assert [path.name for path in output.iterdir()] == ["work.txt"]
    else:
        run_recipe(recipe, monkeypatch, tmp_path, **arguments)
        assert (output / "neighbors.json").is_file()
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_two_commands_do_not_write_one_folder(recipe, teacher, image_folder, tmp_path, monkeypatch, capsys):
    unfinished = tmp_path / "unfinished-out"
    unfinished.mkdir()
    (unfinished / "data.arrow").write_text("of the other command")
    arguments = {"teacher": teacher, "dataset": image_folder, "neighbors_pool": 3, "output": tmp_path / "out"}
    with FileLock(tmp_path / ".out.lock"), pytest.raises(SystemExit) as stop:
        run_recipe(recipe, monkeypatch, tmp_path, **arguments)
    assert stop.value.code == 1 and "another command is writing it" in capsys.readouterr().err
    assert (unfinished / "data.arrow").is_file() and not (tmp_path / "out").exists()
    run_recipe(recipe, monkeypatch, tmp_path, **arguments)
    assert (tmp_path / "out" / "neighbors.json").is_file() and not (tmp_path / ".out.lock").exists()
