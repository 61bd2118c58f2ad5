"""The error of a full disk."""

import datasets
import pytest

from coss_hf.data.loading import load_images


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
