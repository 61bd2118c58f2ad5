"""Search by index: recall, probes, near-duplicates, and the same through add_neighbors."""

import json
import logging
import os

import faiss
import numpy as np
import pytest
import torch

from coss_hf.neighbors import faiss_index as indexes
from coss_hf.neighbors import mining as module
from coss_hf.neighbors.cache import read_neighbors
from coss_hf.neighbors.columns import check_neighbors
from coss_hf.neighbors.embedding_store import Vectors, unit_rows
from coss_hf.neighbors.exact_search import TORCH, ExactSearch
from coss_hf.neighbors.faiss_index import IndexSearch
from coss_hf.neighbors.mining import add_neighbors, nearest_neighbors, search, search_vectors
from coss_hf.neighbors.options import SearchOptions
from coss_hf.neighbors.recall import raise_probes, random_rows
from coss_hf.utils.process_group import Processes
from tests.helpers.neighbors import K, N, TinyBackbone, image_dataset


@pytest.fixture(autouse=True)
def _one_thread_of_faiss():
    faiss.omp_set_num_threads(1)


def clusters(n=3000, dim=16, groups=60, spread=0.5, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((groups, dim))[rng.integers(groups, size=n)]
    return unit_rows(torch.from_numpy(rows + spread * rng.standard_normal((n, dim)))).numpy()


def vectors(rows, dtype="float32", shards=3):
    size = -(-len(rows) // shards)
    return Vectors([rows[start : start + size].astype(dtype) for start in range(0, len(rows), size)])


def run(rows, tmp_path, kind, k=10, dtype="float32", **options):
    options = SearchOptions(neighbors_dtype=dtype, **options)
    return search_vectors(vectors(rows, dtype), k, kind, options, tmp_path)


def agreement(found, expected):
    return (found[:, :, None] == expected[:, None]).any(axis=2).mean()


# ---- exact


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_exact_search_of_shards_over_several_blocks(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("coss_hf.neighbors.exact_search.BLOCK", 700)
    rows = clusters()
    found, meta = run(rows, tmp_path, "exact", dtype=dtype)
    similarity = rows.astype(dtype).astype(np.float64) @ rows.astype(dtype).astype(np.float64).T
    np.fill_diagonal(similarity, -np.inf)
    best = -np.sort(-similarity, axis=1)[:, :10]
    np.testing.assert_allclose(np.take_along_axis(similarity, found, axis=1), best, atol=2e-6)
    assert not (found == np.arange(len(rows))[:, None]).any() and meta == {} and found.dtype == np.int32


def test_exact_search_of_some_rows():
    rows = clusters(500)
    some = np.array([3, 4, 250, 499])
    found, similarity = ExactSearch(vectors(rows))(some, 7)
    assert (found == search(rows, 7)[some]).all()
    np.testing.assert_allclose(similarity, (rows[some, None] * rows[found]).sum(axis=2), atol=1e-6)


# ---- by index


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_reaches_the_recall_that_it_reports(tmp_path, kind, dtype):
    rows = clusters()
    rows[1] = rows[0] = rows[2]  # duplicates: a row's own number is left out all the same
    rows[-3:] = 0
    found, meta = run(rows, tmp_path, kind, dtype=dtype)
    expected = search(rows, 10)
    assert agreement(found, expected) > 0.98
    assert meta["recall"] >= 0.99 and 800 < meta["recall_queries"] <= 1024
    assert found.min() >= 0 and not (found == np.arange(len(rows))[:, None]).any()
    assert all(len(set(row)) == 10 for row in found.tolist())
    similarity = np.take_along_axis(rows @ rows.T, found, axis=1)
    assert (np.diff(similarity, axis=1) < 2e-3).all(), "the most similar first"
    again, same = run(rows, tmp_path / "again", kind, dtype=dtype) if (tmp_path / "again").mkdir() is None else None
    assert (again == found).all() and same == meta, "no chance in it"


def test_recall_is_measured_and_probes_are_raised_until_it_is_reached(tmp_path, caplog):
    rows = unit_rows(torch.randn(4000, 24, generator=torch.Generator().manual_seed(0))).numpy()  # hard: no clusters
    expected, reached = search(rows, 10), {}
    for target in (0.3, 0.7):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            found, meta = run(rows, tmp_path, "ivf", neighbors_recall=target)
        assert meta["recall"] >= target
        assert meta["recall"] == pytest.approx(agreement(found, expected), abs=0.02), "as it truly is"
        assert meta["lists"] == 4000 // 39
        assert ("raised to" in caplog.text) == (target > 0.3)
        reached[target] = meta["probes"]
    assert reached[0.3] == 8 < reached[0.7] <= 0.3 * 4000 // 39
    with caplog.at_level(logging.INFO):
        found, meta = run(rows, tmp_path, "ivf", neighbors_recall=0.999)
    assert (found == expected).all() and "exact search is quicker" in caplog.text
    assert (meta["search"], meta["search_asked"], meta["recall"]) == ("exact", "ivf", 1.0)


def test_an_unreachable_recall_is_warned_of(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(indexes, "HNSW_MAX_PROBES", 16)
    rows = unit_rows(torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))).numpy()
    found, meta = run(rows, tmp_path, "hnsw", neighbors_recall=1.0)
    assert meta["recall"] < 1 and "stays below neighbors_recall=1; use" in caplog.text and found.min() >= 0


def test_recall_is_one_where_max_similarity_leaves_the_sample_no_neighbour(tmp_path):
    index = IndexSearch("hnsw", Vectors([np.ones((40, 1), np.float32)]), tmp_path / "i")
    probes = index.probes
    assert raise_probes(index, 3, 0.9, 0.99, Processes(alone=True)) == (1.0, 40) and index.probes == probes


def test_recall_counts_duplicates_as_found(tmp_path):
    """Of many equal rows any may be given: numbers differ from the exact search's, similarities do not."""
    rows = np.repeat(clusters(60, groups=60), 50, axis=0)
    index = IndexSearch("ivf", vectors(rows), tmp_path / "index")
    assert raise_probes(index, 10, float("inf"), 0.99, Processes()) == (1.0, len(random_rows(3000, 1024)))


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_rows_short_of_neighbors_are_searched_deeper(tmp_path, kind):
    """More neighbours than the first lists hold."""
    rows = clusters(800, groups=40)
    found, _ = run(rows, tmp_path, kind, k=300, neighbors_recall=0.01)
    assert found.min() >= 0 and all(len(set(row)) == 300 for row in found.tolist())


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
@pytest.mark.parametrize("damage", ["truncated", "garbage", "of other vectors"])
def test_a_damaged_index_is_built_again(tmp_path, caplog, kind, damage):
    rows = clusters(1500)
    expected, meta = run(rows, tmp_path, kind)
    path = tmp_path / f"{kind}.index"
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "garbage":
        path.write_bytes(os.urandom(path.stat().st_size))
    else:
        run(clusters(1400), tmp_path / "other" if (tmp_path / "other").mkdir() is None else None, kind)
        for name in (path.name, path.with_suffix(".size").name):
            (tmp_path / "other" / name).replace(tmp_path / name)
    caplog.clear()
    found, again = run(rows, tmp_path, kind)
    assert (found == expected).all() and again == meta
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"The index {path} is damaged: it is built again."
    ]


# ---- near-duplicates


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_near_duplicates_are_left_out_and_replaced_by_the_next(tmp_path, kind, dtype):
    rows = clusters(1200, spread=0.6)
    rows[:400] = rows[400:440].repeat(10, axis=0)  # groups of 11 equal rows, as many as k + 1
    found, _ = run(rows, tmp_path, kind, dtype=dtype, neighbors_max_similarity=0.97)
    similarity = rows.astype(np.float64) @ rows.T
    np.fill_diagonal(similarity, 2)
    assert found.min() >= 0, "there are enough others"
    reached = np.take_along_axis(similarity, found, axis=1)
    assert reached.max() < 0.97 + 1e-3
    similarity[similarity >= 0.97] = -np.inf
    assert (reached > -np.sort(-similarity, axis=1)[:, 9:10] - 1e-3).mean() > 0.98


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_fewer_than_k_left_are_padded(tmp_path, kind, dtype):
    directions = unit_rows(torch.eye(8)).numpy().repeat(50, axis=0)  # 8 groups of 50 equal images
    directions[-1] = 0.5
    directions[-1] /= np.linalg.norm(directions[-1])
    rows = np.concatenate([directions, directions[:1] * 0])
    found, _ = run(rows, tmp_path, kind, k=380, dtype=dtype, neighbors_max_similarity=1.0, neighbors_recall=0.5)
    left = (found >= 0).sum(axis=1)
    assert (left[:350] == 351).all() and (left[350:399] == 352).all() and (left[399:] == 380).all()
    assert (found[:350, 351:] == -1).all() and all(len(set(row[:351])) == 351 for row in found[:350].tolist())
    assert all(not set(range(50)) & set(row) for row in found[:50].tolist())


def test_padded_neighbors_through_the_dataset(tmp_path, caplog):
    """Three images twice: each loses its twin; what is kept says how many are short."""
    dataset = image_dataset([*range(N), 0, 1, 2])
    options = SearchOptions(neighbors_max_similarity=0.999)
    with caplog.at_level(logging.INFO):
        neighbors, meta = nearest_neighbors(
            dataset, TinyBackbone(), "picture", k=N + 2, options=options, cache_dir=tmp_path
        )
    assert meta["fewer"] == 6 and meta["none"] == 0 and "6 images have fewer, 0 of them none" in caplog.text
    short = [0, 1, 2, N, N + 1, N + 2]
    assert (np.flatnonzero((neighbors < 0).any(axis=1)) == short).all() and (neighbors[short, :-1] >= 0).all()
    with_column = add_neighbors(dataset, TinyBackbone(), "picture", k=N + 2, options=options, cache_dir=tmp_path)
    assert (check_neighbors(with_column) == neighbors).all()
    with pytest.raises(ValueError, match="^neighbors_max_similarity=-0.9.*no image any neighbour; raise it"):
        options = SearchOptions(neighbors_max_similarity=-0.9)
        nearest_neighbors(dataset, TinyBackbone(), "picture", k=3, options=options, cache_dir=tmp_path)


# ---- options


def test_the_cache_tells_options_apart(tmp_path, passes):
    def add(**options):
        options = SearchOptions(**options)
        return nearest_neighbors(
            image_dataset(range(N)), TinyBackbone(), "picture", k=K, options=options, cache_dir=tmp_path
        )[1]

    different = [
        {},
        {"neighbors_search": "ivf"},
        {"neighbors_search": "ivf", "neighbors_recall": 0.5},
        {"neighbors_search": "hnsw"},
        {"neighbors_dtype": "float16"},
        {"neighbors_max_similarity": 0.99},
    ]
    found = [add(**options) for options in different]
    assert len(passes) == len(different)
    # So few images have one list, and exact search is quicker.
    assert [meta["search"] for meta in found] == ["exact", "exact", "exact", "hnsw", "exact", "exact"]
    assert [meta.get("search_asked") for meta in found] == [None, "ivf", "ivf", None, None, None]
    assert [add(**options) for options in different] == found
    add(neighbors_search="exact", neighbors_keep_embeddings=True)  # as by default, and from the cache
    assert len(passes) == len(different)
    for folder in tmp_path.iterdir():
        meta = json.loads((folder / "meta.json").read_text())
        assert read_neighbors(folder)[1] | {"sha256": meta["sha256"]} == meta
        assert ("recall" in meta) == (meta["search"] == "hnsw" or "search_asked" in meta)


def test_kept_embeddings_serve_another_search(tmp_path):
    def add(**options):
        backbone = TinyBackbone()
        backbone.features = lambda *_, old=backbone.features: (batches.append(1), old(*_))[1]
        options = SearchOptions(neighbors_keep_embeddings=True, **options)
        return nearest_neighbors(
            image_dataset(range(N)), backbone, "picture", k=K, options=options, cache_dir=tmp_path
        )[0]

    batches = []
    first = add()
    assert len(batches) == 1 and (add(neighbors_search="ivf") == first).all() and len(batches) == 1
    add(neighbors_dtype="float16")
    assert len(batches) == 2


@pytest.mark.skipif(TORCH < (2, 9), reason="TF32 is switched by another name")
def test_exact_search_is_exact_where_training_uses_tf32(monkeypatch):
    found, matmul = [], torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    searcher = ExactSearch(Vectors([np.eye(3, dtype=np.float32)]))
    blocks = searcher._blocks
    monkeypatch.setattr(searcher, "_blocks", lambda: found.append(matmul.fp32_precision) or blocks())
    searcher(np.arange(3), 2)
    after, matmul.fp32_precision = matmul.fp32_precision, before
    assert found == ["ieee"] and after == "tf32"


def test_auto_takes_an_index_for_many_images(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(module.EXACT_UP_TO, "cpu", N - 1)
    for count, kind in ((N, "ivf"), (N - 1, "exact")):
        meta = nearest_neighbors(image_dataset(range(count)), TinyBackbone(), "picture", k=K, cache_dir=tmp_path)[1]
        assert meta.get("search_asked", meta["search"]) == kind
    assert "exact in place of ivf; " in caplog.text, "probes and recall are those of a search that was not made"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"neighbors_search": "flat"}, "neighbors_search flat: choose one of auto, exact, ivf, hnsw"),
        ({"neighbors_recall": 0}, "neighbors_recall=0: give a share"),
        ({"neighbors_recall": 99.0}, "neighbors_recall=99.0: give a share"),
        ({"neighbors_max_similarity": 1.5}, "neighbors_max_similarity=1.5: give a cosine"),
        ({"neighbors_max_similarity": -1.0}, "neighbors_max_similarity=-1.0: give a cosine"),
        ({"neighbors_dtype": "int8"}, "neighbors_dtype int8: choose float32 or float16"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)
