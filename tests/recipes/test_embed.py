"""The recipe that embeds a dataset."""

import re
import sys

import datasets
import numpy as np
import pytest

import coss_hf
from coss_hf.cli.pages import load_recipe
from tests.helpers import runs as h

embed = load_recipe("embed")


@pytest.fixture
def run(monkeypatch, image_parquet, networks, tmp_path):
    def call(output: str, *words: str, dataset=image_parquet):
        options = {"model": networks.vit, "dataset": dataset, "output": tmp_path / output}
        words = [*(f"--{name}={value}" for name, value in options.items()), "--use_cpu", *words]
        monkeypatch.setattr(sys, "argv", ["embed.py", *words])
        embed.main()
        return tmp_path / output

    return call


def test_rows_follow_the_images(run, networks):
    found = np.load(run("a.npy", "--split=test"))
    images = h.colour_images(24, 1)[0]
    expected = coss_hf.embed(networks.vit, images).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_code_of_the_network_is_allowed(run, own_code):
    found = np.load(run("a.npy", "--split=test", f"--model={own_code}", "--trust_remote_code"))
    expected = coss_hf.embed(own_code, h.colour_images(24, 1)[0], trust_remote_code=True).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_parquet_keeps_labels(run):
    file = run("a.parquet", "--normalize", "--batch_size=20")
    rows = datasets.Dataset.from_parquet(str(file))
    assert rows.column_names == ["file_name", "label", "embedding"] and len(rows) == 48
    np.testing.assert_allclose(np.linalg.norm(rows["embedding"], axis=1), 1, atol=1e-5)
    assert rows.features["label"].names == ["red", "green", "blue", "grey"]


def test_rows_of_class_folders_are_told_apart(run, tmp_path):
    """Both images were called 0.png."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        h.colour_images(2, 0)[0][number].save(tmp_path / "photos" / name / "0.png")
    rows = datasets.Dataset.from_parquet(str(run("a.parquet", dataset=tmp_path / "photos")))
    assert rows["file_name"][:] == ["cat/0.png", "dog/0.png"]
    assert rows.features["label"].names == ["cat", "dog"] and rows["label"][:] == [0, 1]


@pytest.mark.parametrize("column", ["file_name", "embedding"])
def test_a_label_column_called_like_one_of_the_output(run, tmp_path, capsys, column):
    images, labels = h.colour_images(4, 0)
    rows = datasets.Dataset.from_dict({"image": images, column: [str(label) for label in labels]})
    rows.to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(SystemExit) as stop:
        run("a.parquet", f"--label_column={column}", dataset=tmp_path / "rows.parquet")
    assert stop.value.code == 2 and not (tmp_path / "a.parquet").exists()
    assert re.search(f"--label_column {column}: .* rename .*or write an .npy", capsys.readouterr().err)
    assert np.load(run("a.npy", f"--label_column={column}", dataset=tmp_path / "rows.parquet")).shape[0] == 4


def test_a_validation_split_that_is_called_test_here(run, tmp_path, capsys):
    images = datasets.Dataset.from_dict({"image": h.colour_images(6, 0)[0]})
    rows = datasets.DatasetDict({"train": images.select(range(4)), "validation": images.select(range(4, 6))})
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(SystemExit) as stop:
        run("a.npy", "--split=validation", dataset=tmp_path / "saved")
    assert stop.value.code == 2 and "give --split test" in capsys.readouterr().err
    assert np.load(run("a.npy", "--split=test", dataset=tmp_path / "saved")).shape[0] == 2


@pytest.mark.parametrize(
    ("output", "word", "message"),
    [
        ("a.txt", "--split=train", "a.txt: give a file with the suffix .npy or .parquet"),
        ("a.npy", "--split=validation", "--split validation: the dataset has no such split; it has train, test"),
        ("a.npy", "--head", "--head: .*vit has no projection head; leave --head out"),
        ("a.npy", "--batch_size=0", "--batch_size 0: give 1 or more"),
        ("a.npy", "--pooling=max", "^error: --pooling='max' is unknown"),  # it was called --model_pooling
        ("a.npy", "--space=projected", "^error: --space=projected: .* does not project images .*leave --space out"),
    ],
)
def test_bad_input(run, output, word, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(output, word)
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)
