"""A copy of photographs at a given shorter side, for repeated runs."""

import sys

import datasets
import numpy as np
import pytest
from PIL import Image

import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.data.decoding import decode
from coss_hf.data.loading import load_images
from coss_hf.data.smaller_copy import smaller_image, write_smaller_copy
from tests.data.test_reduced_decoding import encoded, smooth


@pytest.fixture
def photos(tmp_path):
    """Two classes; one image is smaller than the copies, one is a PNG, one lies on its side."""
    for kind in ("cat", "dog"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
    for name, record in {
        "cat/large.jpg": encoded(smooth(0, 640, 480)),
        "cat/small.jpg": encoded(smooth(1, 50, 40)),
        "dog/picture.png": encoded(smooth(2, 300, 200), "PNG"),
        "dog/turned.jpg": encoded(smooth(3, 400, 200), orientation=6),
    }.items():
        (tmp_path / "photos" / name).write_bytes(record["bytes"])
    return tmp_path / "photos"


def run(monkeypatch, capsys, **options) -> str:
    monkeypatch.setattr(sys, "argv", ["prepare", *(f"--{key}={value}" for key, value in options.items())])
    load_recipe("prepare").main()
    return capsys.readouterr().out


def test_the_copy_is_the_dataset_with_smaller_images(photos, tmp_path, monkeypatch, capsys):
    said = run(monkeypatch, capsys, dataset=photos, output=tmp_path / "copy", shorter_side=60)
    assert "copy: 4 images, 3 of them made smaller, 0 left out;" in said
    before, after = (load_images(str(folder)) for folder in (photos, tmp_path / "copy"))
    assert after.label_column == before.label_column
    assert after.train[after.label_column] == before.train[before.label_column]
    sizes = []
    for row, copied in zip(before.train, after.train, strict=True):
        whole, small = (decode(record["image"]) for record in (row, copied))
        sizes.append(small.size)
        expected = whole if whole.size == small.size else whole.resize(small.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(expected, float) - np.asarray(small, float)).mean() < 2
    assert sorted(sizes) == [(50, 40), (60, 120), (80, 60), (90, 60)]
    small = next(row for row in after.train if decode(row["image"]).size == (50, 40))
    assert small["image"]["bytes"] == (photos / "cat" / "small.jpg").read_bytes()


def test_an_image_longer_than_a_jpeg_can_be_is_kept_as_it_is():
    """A strip of 70,000 pixels: libjpeg takes 65,500, and the error was reported as that of the image."""
    record = {"bytes": encoded(Image.new("RGB", (70_000, 3)), "PNG")["bytes"], "path": None}
    assert smaller_image(record, 2, 95) is not None
    record = {"bytes": encoded(Image.new("RGB", (131_100, 4)), "PNG")["bytes"], "path": None}
    assert smaller_image(record, 2, 95) is None


def test_splits_and_other_columns_are_kept(image_parquet, tmp_path):
    found = write_smaller_copy(str(image_parquet), tmp_path / "copy", 8)
    assert found.images == found.smaller == 72
    copy = datasets.load_from_disk(str(tmp_path / "copy"))
    assert {split: len(rows) for split, rows in copy.items()} == {"train": 48, "test": 24}
    assert copy["train"].features["label"].names == ["red", "green", "blue", "grey"]
    assert copy["train"][0]["image"].size == (8, 8)


def test_undecodable_images_are_named_or_left_out(photos, tmp_path, monkeypatch, capsys):
    (photos / "cat" / "broken.jpg").write_bytes(encoded(smooth(0, 640, 480))["bytes"][:2000])
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, dataset=photos, output=tmp_path / "copy")
    assert stop.value.code == 2 and not (tmp_path / "copy").exists()
    assert "broken.jpg" in capsys.readouterr().err
    said = run(monkeypatch, capsys, dataset=photos, output=tmp_path / "copy", on_bad_image="skip")
    assert "4 images" in said and "1 left out" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--dataset is missing"),
        ({"dataset": "nowhere/at/all"}, "--dataset"),
        ({"shorter_side": 0}, "--shorter_side=0"),
        ({"quality": 100}, "--quality=100"),
        ({"output": "."}, "is there already"),
        ({"image_column": "face"}, "--image_column"),
    ],
)
def test_bad_input_is_refused(photos, tmp_path, monkeypatch, capsys, options, message):
    given = {"dataset": photos, "output": tmp_path / "copy"} if options else {"output": tmp_path / "copy"}
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, capsys, **given | options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "copy").exists()


def test_a_full_disk_leaves_nothing_half_written(photos, tmp_path):
    # All work is in the cache of `datasets` after the first call: the limit meets the copy alone.
    write_smaller_copy(str(photos), tmp_path / "first", 60)
    with h.no_file_larger_than(500), pytest.raises(ValueError, match="--output=.*cannot be written|HF_DATASETS_CACHE"):
        write_smaller_copy(str(photos), tmp_path / "copy", 60)
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".copy*"))


def test_a_copy_is_never_smaller_than_asked():
    for size in [(61, 300), (300, 61), (479, 121), (60, 60), (2000, 130)]:
        data = smaller_image(encoded(smooth(0, *size)), 60, 95)
        expected = size if data is None else decode({"bytes": data, "path": None}).size
        assert min(expected) == 60 and abs(max(expected) / 60 - max(size) / min(size)) < 0.05
