"""A copy of photographs at a given shorter side, for repeated runs."""

import errno
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.data import smaller_copy
from coss_hf.data.decoding import decode
from coss_hf.data.loading import load_images
from coss_hf.data.smaller_copy import smaller_image, write_smaller_copy
from coss_hf.data.sources import load_source
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
    error = capsys.readouterr().err
    assert "broken.jpg" in error and "--on_bad_image skip, which takes what has been copied" in error
    said = run(monkeypatch, capsys, dataset=photos, output=tmp_path / "copy", on_bad_image="skip")
    assert "4 images" in said and "1 left out" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--dataset is missing"),
        ({"dataset": "nowhere/at/all"}, "--dataset"),
        ({"shorter_side": 0}, "--shorter_side=0"),
        ({"quality": 100}, "--quality=100"),
        ({"num_proc": -1}, "--num_proc=-1"),
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of `datasets`, and where parts of copies lie in it."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "coss_hf_smaller_copies"


@pytest.fixture
def copied(monkeypatch):
    """The images that were made smaller; the number in ``stop`` is interrupted."""
    found = SimpleNamespace(count=0, stop=None)

    def counting(record, side, quality):
        found.count += 1
        if found.count == found.stop:
            raise KeyboardInterrupt
        return smaller_image(record, side, quality)

    monkeypatch.setattr(smaller_copy, "smaller_image", counting)
    monkeypatch.setattr(smaller_copy, "PART", 2)
    return found


def test_a_copy_that_was_stopped_goes_on(photos, tmp_path, cache, copied):
    """A folder of images is a table in memory: all of its copies lay in memory, and a stopped call left nothing."""
    copied.stop = 4
    with pytest.raises(KeyboardInterrupt):
        write_smaller_copy(str(photos), tmp_path / "copy", 60)
    copied.count, copied.stop = 0, None
    assert write_smaller_copy(str(photos), tmp_path / "copy", 60).smaller == 3
    assert copied.count == 2, "those of the part that was stopped"
    assert not list(cache.iterdir()), "a finished copy leaves nothing behind"


def test_a_file_that_was_replaced_is_copied_again(photos, tmp_path, cache, copied):
    """One that could not be decoded stayed left out after it was repaired."""
    (photos / "cat" / "large.jpg").write_bytes(b"broken")
    with pytest.raises(ValueError, match="large.jpg"):
        write_smaller_copy(str(photos), tmp_path / "copy", 60)
    (photos / "cat" / "large.jpg").write_bytes(encoded(smooth(0, 640, 480))["bytes"])
    found = write_smaller_copy(str(photos), tmp_path / "copy", 60)
    assert (found.images, found.left_out) == (4, 0)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_copies_of_other_images_at_the_same_paths_are_told_apart(photos, tmp_path, cache, num_proc):
    """Both had one fingerprint, under which hashes of the images are kept."""
    fingerprints = []
    for number, width in enumerate((640, 320)):
        (photos / "cat" / "large.jpg").write_bytes(encoded(smooth(0, width, 480))["bytes"])
        write_smaller_copy(str(photos), tmp_path / f"copy{number}", 60, num_proc=num_proc)
        fingerprints.append(load_source(str(tmp_path / f"copy{number}"), None, None).splits["train"]._fingerprint)
    assert fingerprints[0] != fingerprints[1]


def test_an_image_that_could_not_be_read_is_tried_again(photos, tmp_path, cache, monkeypatch):
    """A disk that failed for a moment, a permission that was missing: the file itself is as it was."""

    def fails(record, side, quality):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(smaller_copy, "smaller_image", fails)
        with pytest.raises(ValueError, match="4 images of split train cannot be decoded"):
            write_smaller_copy(str(photos), tmp_path / "copy", 60)
    assert write_smaller_copy(str(photos), tmp_path / "copy", 60).left_out == 0


def test_two_calls_do_not_share_parts(photos, tmp_path, cache, monkeypatch):
    def again(record, side, quality):
        with pytest.raises(ValueError, match="another call is copying these images"):
            write_smaller_copy(str(photos), tmp_path / "second", 60)
        return smaller_image(record, side, quality)

    monkeypatch.setattr(smaller_copy, "smaller_image", again)
    assert write_smaller_copy(str(photos), tmp_path / "first", 60).images == 4
    assert not (tmp_path / "second").exists()


def test_an_empty_split_stays_empty(tmp_path, cache):
    h.write_images(tmp_path / "images", train=8)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "images" / "train.parquet"))
    saved = datasets.DatasetDict({"train": rows, "test": rows.select([])})
    saved.save_to_disk(tmp_path / "saved")
    assert write_smaller_copy(str(tmp_path / "saved"), tmp_path / "copy", 8).images == 8
    copy = load_source(str(tmp_path / "copy"), None, None).splits
    assert len(copy["train"]) == 8 and len(copy["test"]) == 0


def test_what_is_no_fault_of_an_image_is_raised(photos, tmp_path, cache, monkeypatch):
    """Too many open files: good images were left out by --on_bad_image skip."""

    def too_many(record, side, quality):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(smaller_copy, "smaller_image", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        write_smaller_copy(str(photos), tmp_path / "copy", 60, on_bad_image="skip")
    assert not (tmp_path / "copy").exists()


def test_a_full_disk_leaves_nothing_half_written(photos, tmp_path, cache, copied, monkeypatch):
    def full(self, folder):
        Path(folder).mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(datasets.DatasetDict, "save_to_disk", full)
        with pytest.raises(ValueError, match="--output=.*cannot be written .*continues with what it has copied"):
            write_smaller_copy(str(photos), tmp_path / "copy", 60)
    assert not (tmp_path / "copy").exists() and not list(tmp_path.glob(".copy*"))
    copied.count = 0
    write_smaller_copy(str(photos), tmp_path / "copy", 60)
    assert copied.count == 0, "all was copied before"
    with h.no_file_larger_than(500), pytest.raises(ValueError, match="HF_DATASETS_CACHE|--output="):
        write_smaller_copy(str(photos), tmp_path / "other", 50)
    assert not (tmp_path / "other").exists()


def test_several_processes_copy_the_same(photos, tmp_path, cache):
    write_smaller_copy(str(photos), tmp_path / "one", 60)
    write_smaller_copy(str(photos), tmp_path / "two", 60, num_proc=2)
    one, two = (datasets.load_from_disk(str(tmp_path / name))["train"] for name in ("one", "two"))
    assert [np.asarray(row["image"]).tobytes() for row in one] == [np.asarray(row["image"]).tobytes() for row in two]


def test_a_copy_is_never_smaller_than_asked():
    for size in [(61, 300), (300, 61), (479, 121), (60, 60), (2000, 130)]:
        data = smaller_image(encoded(smooth(0, *size)), 60, 95)
        expected = size if data is None else decode({"bytes": data, "path": None}).size
        assert min(expected) == 60 and abs(max(expected) / 60 - max(size) / min(size)) < 0.05
