"""Loader workers without shared memory die, or are waited for without end: a run says so before it starts."""

import shutil
from collections import namedtuple

import pytest

import tests.helpers.runs as h
from coss_hf.utils.shared_memory import check_shared_memory

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return lambda size: monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(size, 0, size))


def test_all_batches_that_may_be_loaded_ahead_must_find_room(free, monkeypatch):
    free(15_000)
    check_shared_memory(2, {"views": 3000})  # two batches of each worker, and the one in use
    check_shared_memory(0, {"views": 10**9})
    for workers, prefetch in ((3, None), (2, 3)):
        with pytest.raises(ValueError, match=f"--dataloader_num_workers={workers}: .* 0.0 MB free.*--shm-size"):
            check_shared_memory(workers, {"views": 3000}, prefetch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes x 5 batches"):
        check_shared_memory(2, {"views": 3000})


def test_a_run_is_refused_before_it_searches_neighbours(tmp_path, image_parquet, networks, free):
    free(100_000)  # a batch of 8 views of 16x16 has 6,144 bytes
    options = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 2}
    h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    with pytest.raises(ValueError, match="may take 4.0 MB .*images to embed 0.8 MB"):
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options, neighbors_k=1)
