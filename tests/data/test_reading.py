"""Images that are deleted, truncated or replaced while a run is at work."""

import errno
import logging
import os

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from coss_hf.data.loading import load_images
from coss_hf.data.processed_images import ProcessedImages
from coss_hf.data.reading import ImageReader
from coss_hf.data.run_images import RunImages
from coss_hf.data.views import ViewDataset, collate_views
from coss_hf.utils.errors import RunStopped, UnreadableImage

N = 10


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for i in range(N):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    return tmp_path / "images"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def load(folder, **options):
    return load_images(str(folder), **options)


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:90])


def views(splits, name="cifar") -> ViewDataset:
    neighbors = np.array([[(i + 1) % N, (i + 2) % N] for i in range(N)], np.int32)
    return ViewDataset(splits.train, "image", name, 8, neighbors=neighbors, k=1, on_bad_image=splits.on_bad_image)


def batches(dataset, **options) -> dict[str, torch.Tensor]:
    found = list(DataLoader(dataset, batch_size=4, collate_fn=collate_views, **options))
    return {key: torch.cat([batch[key] for batch in found]) for key in found[0]}


@pytest.mark.parametrize("spoil", [delete, truncate])
def test_another_image_takes_the_place_of_one_that_is_gone(folder, spoil, caplog):
    dataset = views(load(folder, on_bad_image="skip"), "none")
    before = batches(dataset)
    gone = [0, 7]  # rows of class0/0.png and class1/5.png
    for name in ("class0/0.png", "class1/5.png"):
        spoil(folder / name)
    with caplog.at_level(logging.WARNING):
        after = batches(dataset)
    assert torch.equal(before["index"], after["index"])
    images = {int(index): view for index, view in zip(before["index"], before["pixel_values"], strict=True)}
    for index, view in zip(after["index"].tolist(), after["pixel_values"], strict=True):
        same = [row for row, image in images.items() if torch.equal(image, view)]
        assert same == [index] if index not in gone else same and same[0] not in gone
    assert dataset.reader.replaced() == gone and len(caplog.records) == 2
    assert "class0/0.png" in caplog.text and "takes its place (1 so far)" in caplog.text
    assert [os.path.basename(name) for name in dataset.reader.replaced_names()] == ["0.png", "5.png"]


@pytest.mark.parametrize("name", ["cifar", "moco"])
def test_the_replacement_depends_on_nothing_but_the_row(folder, name):
    splits = load(folder, on_bad_image="skip")
    delete(folder / "class0" / "4.png")
    first = views(splits, name)
    again = views(splits, name)
    expected = batches(first)
    forked = batches(again, num_workers=2)
    assert torch.equal(expected["pixel_values"], forked["pixel_values"])
    assert first.reader.replaced() == again.reader.replaced() == [2]  # workers tell the main process
    anchors = [7, 2, 0]
    for anchor in anchors:
        assert torch.equal(first[anchor]["pixel_values"], expected["pixel_values"][2 * anchor : 2 * anchor + 2])
    if name == "cifar":
        keeping = views(splits, name)
        assert keeping.keep_images() and torch.equal(batches(keeping)["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("in_worker", [False, True])
def test_an_error_says_which_file_and_how_to_resume(folder, in_worker):
    dataset = views(load(folder))
    delete(folder / "class0" / "4.png")
    with pytest.raises(UnreadableImage) as caught:
        try:
            batches(dataset)
        except UnreadableImage:
            if in_worker:  # as a loader hands it to the main process, whose shutdown of real workers takes seconds
                ExceptionWrapper(where="in DataLoader worker process 0").reraise()
            raise
    message = str(caught.value)
    assert message.startswith("--on_bad_image error: image ") and "class0/4.png cannot be decoded" in message
    assert "--resume_from_checkpoint" in message and "--on_bad_image skip" in message and "Traceback" not in message
    assert isinstance(caught.value, RunStopped) and isinstance(caught.value, ValueError) and caught.value.found


def test_all_images_gone(folder):
    dataset = views(load(folder, on_bad_image="skip"))
    for path in folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(UnreadableImage, match="100 other images neither. Make the images available"):
        batches(dataset)


def test_images_for_evaluation_are_replaced_too(folder):
    splits = load(folder, on_bad_image="skip")
    delete(folder / "class0" / "4.png")
    seen = []
    images = ProcessedImages(splits.train, "image", lambda batch: [seen.append(np.asarray(x)) for x in batch], "skip")
    images.__getitems__(list(range(N)))
    assert sum(np.array_equal(seen[2], other) for other in seen) == 2  # row 2 is 4.png
    with pytest.raises(UnreadableImage):
        ProcessedImages(splits.train, "image", len)[2]


def test_too_many_open_files_are_no_fault_of_an_image(folder, monkeypatch):
    reader = ImageReader(load(folder, on_bad_image="skip").train, "image", "skip")

    def read_bytes(self):
        raise OSError(errno.EMFILE, "Too many open files", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", read_bytes)
    with pytest.raises(OSError, match="Too many open files"):
        list(reader.read([0]))


# ---- resuming ----


@pytest.mark.parametrize("spoil", [delete, truncate])
@pytest.mark.parametrize("validation_size", [0, 3])
def test_a_run_resumes_with_the_images_it_began_with(folder, tmp_path, spoil, validation_size, caplog):
    options = {"validation_size": validation_size, "on_bad_image": "skip"}
    (folder / "class1" / "bad.png").write_bytes(b"bad from the start")
    began = load(folder, **options)
    began.run_images.save(tmp_path / "run")
    spoil(folder / "class0" / "4.png")
    spoil(folder / "class1" / "5.png")
    picture(99).save(folder / "class1" / "bad.png")  # repaired
    picture(98).save(folder / "class0" / "0new.png")
    resumed = load(folder, **options, recorded=RunImages.load(tmp_path / "run"))
    assert began.train["image_hash"][:] == resumed.train["image_hash"][:]
    assert began.train["label"][:] == resumed.train["label"][:]
    assert began.train.features == resumed.train.features and began.bad_images == resumed.bad_images
    if validation_size:
        assert began.validation["image_hash"][:] == resumed.validation["image_hash"][:]
    else:
        assert views(began).identity() == views(resumed).identity()
    assert "2 images of split train can no longer be decoded" in caplog.text and "4.png" in caplog.text
    assert "1 images came into" in caplog.text and "0new.png" in caplog.text
    assert len(resumed.bad_images) == 1


def test_a_resume_that_must_not_skip_names_the_files(folder, tmp_path):
    load(folder).run_images.save(tmp_path / "run")
    delete(folder / "class0" / "4.png")
    with pytest.raises(ValueError, match="1 images of split train can no longer be decoded: .*4.png. Restore.*skip"):
        load(folder, recorded=RunImages.load(tmp_path / "run"))


@pytest.mark.parametrize("on_bad_image", ["error", "skip"])
def test_a_replaced_image_is_noticed(folder, tmp_path, on_bad_image):
    load(folder).run_images.save(tmp_path / "run")
    picture(77).save(folder / "class0" / "4.png")
    with pytest.raises(ValueError, match="1 images of split train are not those that the run began with: .*4.png"):
        load(folder, on_bad_image=on_bad_image, recorded=RunImages.load(tmp_path / "run"))


def test_a_folder_that_was_moved_is_the_same(folder, tmp_path):
    began = load(folder)
    began.run_images.save(tmp_path / "run")
    os.rename(folder, tmp_path / "moved")
    resumed = load(tmp_path / "moved", recorded=RunImages.load(tmp_path / "run"))
    assert views(began).identity() == views(resumed).identity()


def test_damaged_and_missing_records(folder, tmp_path):
    assert RunImages.load(tmp_path / "run") is None
    load(folder).run_images.save(tmp_path / "run")
    (tmp_path / "run" / "_images" / "checked-0.npz").write_bytes(b"x")
    with pytest.raises(ValueError, match="_images is damaged"):
        RunImages.load(tmp_path / "run")
