import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from coss_hf.cli.pages import load_recipe
from tests.helpers.runs import ROOT

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def test_digits_on_disk(tmp_path):
    from sklearn.datasets import load_digits

    splits = load_recipe("quickstart").write_digits(tmp_path / "data")
    stored = datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in stored.items()} == {"train": 1437, "test": 360}
    digits, start = load_digits(), 0
    for name, rows in stored.items():
        pixels = np.stack([np.asarray(image) for image in rows["image"]])
        own = digits.images[start : start + len(rows)]
        assert pixels.dtype == np.uint8 and pixels.shape == own.shape and pixels.max() == 255
        assert np.abs(pixels.astype(float) * 16 / 255 - own).max() < 0.04
        assert rows["label"][:] == digits.target[start : start + len(rows)].tolist()
        embedded, labels = splits[name]
        assert np.array_equal(embedded.numpy(), pixels.reshape(len(rows), 64)) and labels.tolist() == rows["label"][:]
        start += len(rows)
    assert stored["train"].features["label"].names == list("0123456789")


def test_mean_and_spread_over_seeds():
    quickstart = load_recipe("quickstart")
    runs = [{"student": {"name": "x", "parameters": 7, "knn10": value, "cosine": None}} for value in (0.5, 1.0)]
    assert quickstart.over_seeds(runs, np.mean) == {"student": {"knn10": 0.75}}


@pytest.mark.slow
def test_quickstart(tmp_path):
    program = [sys.executable, str(ROOT / "recipes" / "quickstart.py"), "--output", str(tmp_path / "quick start")]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    record = json.loads(Path(tmp_path, "quick start", "results.json").read_text())
    scores = {name: row["knn20"] for name, row in record["mean"].items()}
    assert scores["student"] >= scores["random"] + 0.15 and scores["student"] >= scores["teacher"] - 0.02
    for picture in ("neighbors.png", "loss.png"):
        assert Path(tmp_path, "quick start", "seed0", "student", picture).is_file()
    assert "raw pixels" in run.stdout and "coss-hf distill --config quickstart" in run.stdout
