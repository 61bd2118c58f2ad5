"""The error of a full disk."""

import errno

import datasets
import pytest
import torch
from safetensors.torch import save_file

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.utils.disk import FULL, full_disk, unwritable_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("stage", ["load", "check"])
def test_a_full_disk_is_named(tmp_path, image_parquet, monkeypatch, stage):
    def full(*args, **kwargs):
        try:
            raise OSError(28, "No space left on device")
        finally:
            raise ValueError("I/O operation on closed file")  # as pyarrow does

    owner, name = (datasets, "load_dataset") if stage == "load" else (datasets.Dataset, "map")
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(ValueError, match="HF_DATASETS_CACHE=.*No space left on device.*free some space") as caught:
        load_images(str(image_parquet))
    assert "Hub name" not in str(caught.value)


@pytest.mark.parametrize("write", ["torch", "safetensors"])
def test_the_full_disk_behind_an_error_of_another_library_is_found(tmp_path, write):
    """`torch.save` gave "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"."""
    tensors = {"a": torch.zeros(100_000)}
    with h.no_file_larger_than(5000), pytest.raises(Exception) as caught:
        torch.save(tensors, tmp_path / "x") if write == "torch" else save_file(tensors, tmp_path / "x")
    found = full_disk(caught.value)
    assert found.errno in FULL and "inline_container" not in str(found)


def test_other_errors_are_no_full_disk():
    assert full_disk(RuntimeError("CUDA out of memory")) is None and full_disk(OSError(13, "Permission denied")) is None


@pytest.mark.parametrize("place", ["file", "below a file", "of the system"])
def test_unwritable_cache_is_named_instead_of_the_dataset(tmp_path, image_parquet, monkeypatch, caplog, place):
    (tmp_path / "file").write_text("")
    cache = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "of the system": "/proc/x/y"}[place]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    with pytest.raises(ValueError, match=f"^HF_DATASETS_CACHE={cache} cannot be written") as caught:
        load_images(str(image_parquet))
    assert "set HF_DATASETS_CACHE to another folder" in str(caught.value)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(h.colour_images(20, seed=0)[0]):  # few images would not be worth a file
        image.save(tmp_path / "folder" / f"{i}.png")
    assert len(load_images(str(tmp_path / "folder")).train) == 20, "a folder of images needs no cache"
    assert f"is not kept in {cache}" in caplog.text and "set HF_DATASETS_CACHE to another folder" in caplog.text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST])
def test_cache_variable_is_found_from_the_error(number, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/hub/cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/datasets")
    for path, expected in (
        ("/hub/cache/datasets--a/x.lock", "HF_HUB_CACHE"),
        ("/hub", "HF_HUB_CACHE"),
        ("/datasets/parquet", "HF_DATASETS_CACHE"),
        ("/datasets2/x", None),
        ("/my/images", None),
        (None, None),
    ):
        error = ValueError("outer")
        error.__cause__ = OSError(number, "no", path) if path else OSError(number, "no")
        found = unwritable_cache(error)
        assert (found and found[0]) == expected
    assert unwritable_cache(OSError("Failed to open local file '/datasets/x.arrow'"))[0] == "HF_DATASETS_CACHE"
