"""The error of a full disk."""

import datasets
import pytest
import torch
from safetensors.torch import save_file

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.utils.disk import FULL, full_disk


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
    with pytest.raises(ValueError, match="HF_DATASETS_CACHE=.*No space left on device.*make room") as caught:
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
