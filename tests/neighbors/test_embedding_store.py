"""coss_hf.neighbors.embedding_store: shards of embeddings on disk."""

import numpy as np
import pytest
import torch

from coss_hf.data.processed_images import ProcessedImages
from coss_hf.neighbors import embedding_store as store
from coss_hf.neighbors.embedding_store import Vectors, embed_shards, shard_rows, unit_rows
from coss_hf.neighbors.mining import nearest_neighbors
from coss_hf.neighbors.options import SearchOptions
from tests.helpers.neighbors import K, N, TinyBackbone, image_dataset


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(store, "SHARD", 4)
    monkeypatch.setattr(store, "STEP", 4)


def embed(folder, count=N - 1, **options):
    backbone = TinyBackbone()
    images = ProcessedImages(image_dataset(range(count)), "picture", backbone.preprocess)
    return embed_shards(backbone, images, folder, batch_size=3, **options)


def direct(count=N - 1):
    backbone = TinyBackbone()
    images = ProcessedImages(image_dataset(range(count)), "picture", backbone.preprocess)
    return unit_rows(backbone.features(torch.stack(images.__getitems__(range(count)))).embedding).numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_shards_hold_unit_rows_and_are_mapped(small, tmp_path, dtype):
    vectors = embed(tmp_path, dtype=dtype)
    assert vectors.shape == (N - 1, 12) and vectors.dtype == dtype
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:05d}.npy" for i in range(6)]
    assert all(isinstance(shard, np.memmap) for shard in vectors.shards)
    np.testing.assert_allclose(vectors.read(0, N - 1), direct(), atol=1e-6 if dtype == "float32" else 3e-4)
    assert np.load(tmp_path / "00005.npy").shape == (3, 12)


def test_reading_rows_blocks_and_selections():
    rows = np.arange(22, dtype=np.float32).reshape(11, 2)
    vectors = Vectors([rows[:4], rows[4:8], rows[8:]])
    for start in range(11):
        for stop in range(start + 1, 12):
            assert (vectors.read(start, stop) == rows[start:stop]).all()
    assert np.shares_memory(vectors.read(5, 8), rows)
    for chosen in ([0], [3, 4], [10], [0, 5, 7, 8, 10], list(range(11))):
        assert (vectors.take(np.array(chosen)) == rows[chosen]).all()
    assert [(start, len(block)) for start, block in vectors.blocks(5)] == [(0, 5), (5, 5), (10, 1)]


@pytest.mark.parametrize("damage", ["missing", "short", "empty", "other shape", "other dtype"])
def test_only_what_is_missing_or_damaged_is_embedded_again(small, tmp_path, monkeypatch, caplog, damage):
    before = embed(tmp_path).read(0, N - 1).copy()
    path = tmp_path / "00002.npy"
    data = np.load(path)
    path.unlink()
    if damage in ("short", "empty"):
        np.save(path, data)
        path.write_bytes(path.read_bytes()[: -7 if damage == "short" else 0])
    elif damage != "missing":
        np.save(path, data[1:] if damage == "other shape" else data.astype(np.float16))
    batches = []
    real = TinyBackbone.features
    monkeypatch.setattr(TinyBackbone, "features", lambda self, x: (batches.append(len(x)), real(self, x))[1])
    assert (embed(tmp_path).read(0, N - 1) == before).all() and batches == [3, 1]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (damage != "missing") and all("00002.npy" in message for message in warnings)


def test_a_full_disk_leaves_finished_shards(small, tmp_path, monkeypatch):
    real, written = np.save, []

    def full(file, array):
        written.append(1)
        if len(written) == 3:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(file, array)

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(
        ValueError, match=f"--neighbors_cache {tmp_path.parent}: .*00002.npy.*No space left.*free some space"
    ):
        embed(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.npy", "00001.npy"]
    monkeypatch.setattr(np, "save", real)
    np.testing.assert_allclose(embed(tmp_path).read(0, N - 1), direct(), atol=1e-6)


def test_unwritable_index_is_reported(tmp_path, monkeypatch):
    import faiss

    def full(*_):
        raise RuntimeError("Error: 'ret == (size)' failed: write error: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    options = SearchOptions(neighbors_search="ivf")
    with pytest.raises(ValueError, match="^cache_dir .*ivf.index cannot be written.*No space left"):
        nearest_neighbors(image_dataset(range(N)), TinyBackbone(), "picture", k=K, options=options, cache_dir=tmp_path)
    (work,) = tmp_path.iterdir()
    assert [path.name for path in work.iterdir()] == ["00000.npy"]


def test_invalid_cache_folder_is_rejected(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^cache_dir .*file.*give another folder"):
        nearest_neighbors(image_dataset(range(N)), TinyBackbone(), "picture", k=K, cache_dir=tmp_path / "file")


def test_embeddings_that_are_not_finite_are_named(small, tmp_path, monkeypatch):
    real = TinyBackbone.features

    def broken(self, pixel_values):
        features = real(self, pixel_values)
        features.embedding[features.embedding[:, 0] == direct_first] = torch.inf
        return features

    backbone = TinyBackbone()
    direct_first = real(backbone, backbone.preprocess([_image(9)])).embedding[0, 0]
    monkeypatch.setattr(TinyBackbone, "features", broken)
    with pytest.raises(
        ValueError,
        match=r"^Embedding for neighbours: .*NaN or infinity for 1 of .*: row 9\. Use float32 \(--teacher_dtype\)",
    ):
        embed(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.npy", "00001.npy"]


def _image(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_the_model_is_left_as_it_was(small, tmp_path):
    backbone = TinyBackbone()
    backbone.model.train()
    embed_shards(backbone, ProcessedImages(image_dataset(range(9)), "picture", backbone.preprocess), tmp_path)
    assert backbone.model.training


@pytest.mark.parametrize(
    "n, rows", [(1, 256), (24, 256), (50_000, 1024), (1_000_000, 8192), (33_000_000, 8192), (10**9, 244_224)]
)
def test_size_of_shards(n, rows):
    assert shard_rows(n) == rows and -(-n // rows) <= 4096
