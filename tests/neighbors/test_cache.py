"""The cache of coss_hf.neighbors."""

import hashlib
import json
import multiprocessing
from pathlib import Path

import datasets
import numpy as np
import pytest

from coss_hf.neighbors.cache import read_neighbors, write_neighbors
from coss_hf.neighbors.columns import check_neighbors
from coss_hf.neighbors.mining import add_neighbors
from tests.helpers.neighbors import K, N, TinyBackbone, image_dataset

ROOT = Path(__file__).resolve().parents[2]


def add(dataset, folder, weights="a", k=K):
    return add_neighbors(dataset, TinyBackbone(weights), "picture", k=k, cache_dir=folder)


def test_cache_is_found_by_the_same_call_only(tmp_path, passes):
    first = add(image_dataset(range(N)), tmp_path)
    assert len(passes) == 1
    assert add(image_dataset(range(N)), tmp_path).to_list() == first.to_list()
    assert len(passes) == 1
    for number, other in enumerate(
        [
            lambda: add(image_dataset(range(N)), tmp_path, weights="b"),
            lambda: add(image_dataset(range(N)), tmp_path, k=K + 1),
            lambda: add(image_dataset([*range(N - 1), 99]), tmp_path),
            lambda: add(image_dataset(range(N - 1)), tmp_path),
            lambda: add(image_dataset(range(N)[::-1]), tmp_path),
        ]
    ):
        check_neighbors(other())
        assert len(passes) == number + 2
    assert len(list(tmp_path.iterdir())) == 6  # and nothing temporary


def test_cache_entry_and_its_default_place(tmp_path, passes, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    dataset = add(image_dataset(range(N)), None)
    (folder,) = (tmp_path / "coss_hf").iterdir()
    assert (np.load(folder / "neighbors.npy") == check_neighbors(dataset)).all()
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["images"] == N and meta["neighbors"] == K and meta["dim"] == 12
    assert meta["teacher"] == "tiny" and meta["pooling"] == "gap" and meta["seconds"] >= 0 and meta["versions"]["faiss"]


def damage_nothing_left(folder):
    for file in folder.iterdir():
        file.unlink()


def damage_truncate(folder):
    data = (folder / "neighbors.npy").read_bytes()
    (folder / "neighbors.npy").write_bytes(data[:-20])


def damage_flip(folder):
    data = bytearray((folder / "neighbors.npy").read_bytes())
    data[-8:] = bytes(8)
    (folder / "neighbors.npy").write_bytes(data)


def damage_meta(folder):
    (folder / "meta.json").write_text("[]")


def damage_not_a_folder(folder):
    damage_nothing_left(folder)
    folder.rmdir()
    folder.write_text("")


@pytest.mark.parametrize(
    "damage", [damage_nothing_left, damage_truncate, damage_flip, damage_meta, damage_not_a_folder]
)
def test_damaged_cache_is_computed_again(tmp_path, passes, damage, caplog):
    first = add(image_dataset(range(N)), tmp_path)
    (folder,) = tmp_path.iterdir()
    damage(folder)
    assert add(image_dataset(range(N)), tmp_path).to_list() == first.to_list()
    assert len(passes) == 2 and "damaged" in caplog.text
    assert add(image_dataset(range(N)), tmp_path).to_list() == first.to_list()
    assert len(passes) == 2
    assert list(tmp_path.iterdir()) == [folder]


def write_often(folder, number):
    for _ in range(60):
        write_neighbors(folder, np.full((50, 4), number, dtype=np.int32), {})


def test_concurrent_writers_leave_a_complete_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(tmp_path / "entry", number)) for number in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        found = read_neighbors(tmp_path / "entry")
        assert found is None or len(np.unique(found[0])) == 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(np.unique(read_neighbors(tmp_path / "entry")[0])) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_neighbors_are_used_where_the_cache_is_unwritable(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hashlib, "file_digest", full)
    assert check_neighbors(add(image_dataset(range(N)), tmp_path)).shape == (N, K)
    assert "No space left" in caplog.text
    (left,) = tmp_path.iterdir()  # so that the next search need not embed
    assert left.name.startswith("embeddings-") and [file.name for file in left.iterdir()] == ["00000.npy"]
