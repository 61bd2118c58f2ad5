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
    def call(output: str, *words: str):
        options = {"model": networks.vit, "dataset": image_parquet, "output": tmp_path / output}
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


def test_parquet_keeps_labels(run):
    file = run("a.parquet", "--normalize", "--batch_size=20")
    rows = datasets.Dataset.from_parquet(str(file))
    assert rows.column_names == ["file_name", "label", "embedding"] and len(rows) == 48
    np.testing.assert_allclose(np.linalg.norm(rows["embedding"], axis=1), 1, atol=1e-5)


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
