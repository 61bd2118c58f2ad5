"""coss_hf.neighbors: exact search, and the hashes that tell whose neighbours a dataset carries."""

import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from coss_hf.data.loading import ImageSplits
from coss_hf.neighbors.columns import check_neighbors, image_hashes, neighbor_hashes
from coss_hf.neighbors.dataset import splits_with_neighbors
from coss_hf.neighbors.mining import add_neighbors, search
from tests.helpers.neighbors import K, N, TinyBackbone, image_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def neighborly(tmp_path_factory):
    return add_neighbors(
        image_dataset(range(N)), TinyBackbone(), "picture", k=K, cache_dir=tmp_path_factory.mktemp("cache")
    )


def brute_force(embeddings, k):
    """Similarities (n, n) in float64, own entries last, and the sorted similarities of the k nearest others."""
    rows = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    similarity = rows @ rows.T
    others = similarity.copy()
    np.fill_diagonal(others, -np.inf)
    return similarity, -np.sort(-others, axis=1)[:, :k], np.argsort(-others, axis=1, kind="stable")[:, :k]


def assert_exact(embeddings, k):
    """The right similarities in the right order (indices may differ among ties), no row twice, never the row itself."""
    found = search(embeddings, k)
    n = len(embeddings)
    assert found.dtype == np.int32 and found.shape == (n, k)
    assert found.min() >= 0 and found.max() < n
    assert not (found == np.arange(n)[:, None]).any()
    assert all(len(set(row)) == k for row in found.tolist())
    similarity, best, _ = brute_force(embeddings, k)
    np.testing.assert_allclose(np.take_along_axis(similarity, found, axis=1), best, atol=2e-6)
    return found


# ---- search


@pytest.mark.parametrize("n, dim, k", [(300, 16, 7), (300, 16, 150), (2500, 8, 11), (2, 3, 1), (12, 4, 11), (12, 1, 3)])
def test_search_agrees_with_brute_force(n, dim, k):
    scale = np.random.default_rng(1).uniform(1e-3, 1e3, (n, 1))  # lengths must not matter
    embeddings = (np.random.default_rng(0).standard_normal((n, dim)) * scale).astype(np.float32)
    found = assert_exact(embeddings, k)
    if (n, dim, k) == (300, 16, 7):  # no near ties here: the very same indices
        assert (found == brute_force(embeddings, k)[2]).all()


@pytest.mark.parametrize("k", [1, 3, 20, 60])
def test_search_among_duplicates_leaves_out_the_row_itself(k):
    rng = np.random.default_rng(0)
    embeddings = np.concatenate([np.repeat(rng.standard_normal((2, 8)), 50, axis=0), rng.standard_normal((40, 8))])
    embeddings = embeddings[rng.permutation(len(embeddings))]
    found = assert_exact(embeddings, k)
    twins = (embeddings[found] == embeddings[:, None]).all(axis=2).sum(axis=1)
    copies = (embeddings[:, None] == embeddings[None]).all(axis=2).sum(axis=1) - 1
    assert (twins == np.minimum(copies, k)).all()  # identical images are each other's nearest


@pytest.mark.parametrize("limit, left", [(1.0, 1), (0.999, 0)])
def test_search_leaves_out_duplicates_whose_product_is_rounded(limit, left):
    """The product of a unit row with itself is below 1 as often as not."""
    rows = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    near = units + 0.01 * np.roll(units, 1, axis=1)  # cosines of 0.9999 or so
    embeddings = np.concatenate([rows, rows, near])
    found = search(embeddings, 3, max_similarity=limit)
    similarity, _, _ = brute_force(embeddings, 3)
    assert (found >= 0).all()
    of_found = np.take_along_axis(similarity, found, axis=1)
    assert of_found.max() < limit - 1e-6
    assert ((of_found > 0.999).any(axis=1) == left).all()


def test_search_all_rows_equal():
    assert_exact(np.ones((1500, 4), dtype=np.float32), 10)  # more ties than k + 1, over two chunks of queries


@pytest.mark.parametrize("zeros", [1, 5, 30])
def test_search_with_rows_of_zeros(zeros):
    embeddings = np.random.default_rng(0).standard_normal((30, 6))
    embeddings[:zeros] = 0
    assert_exact(embeddings, 4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_search_of_extreme_lengths(scale):
    embeddings = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    assert (search(embeddings * np.float32(scale), 5) == search(embeddings, 5)).all()


def test_search_takes_tensors_of_any_precision_and_leaves_them_alone():
    embeddings = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = embeddings.detach().clone()
    assert (search(embeddings, 5) == search(embeddings.detach().numpy(), 5)).all()
    assert torch.equal(embeddings, before)
    assert_exact(embeddings.detach().to(torch.bfloat16).float(), 5)
    assert search(embeddings.to(torch.bfloat16), 5).shape == (40, 5)


@pytest.mark.parametrize("k, n, advice", [(20, 20, "k=19 or fewer"), (31, 20, "k=19 or fewer"), (1, 1, "more")])
def test_search_refuses_k_that_the_rows_cannot_give(k, n, advice):
    with pytest.raises(ValueError, match=f"^k={k}.*{advice}"):
        search(np.ones((n, 3)), k)


def test_search_refuses_bad_input():
    with pytest.raises(ValueError, match="^k=0: use 1 or more, the number of neighbours"):
        search(np.ones((4, 3)), 0)
    with pytest.raises(ValueError, match="embeddings: the shape"):
        search(np.ones((4, 3, 2)), 1)
    embeddings = np.ones((2000, 3), dtype=np.float32)
    embeddings[[7, 1500], [0, 2]] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 2000 rows.*rows 7, 1500\).*embed in float32"):
        search(embeddings, 3)


# ---- hashes


def test_hashes_are_the_same_everywhere():
    """Gold values by the same arithmetic on Python integers: stored hashes must be readable by every later version."""
    hashes, rows = [1, 2**64 - 1, 0x0123456789ABCDEF], [[1, 2], [0, -1], [1, 0]]
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    expected = []
    for own, row in zip(hashes, rows, strict=True):
        state = mix(own ^ (3 * 0x9E3779B97F4A7C15 & mask))
        for j in row:
            state = mix((state + 0x9E3779B97F4A7C15 & mask) ^ (hashes[j] if j >= 0 else mask))
        expected.append(state)
    found = neighbor_hashes(np.array(hashes, dtype=np.uint64), np.array(rows, dtype=np.int32))
    assert found.dtype == np.uint64 and found.tolist() == expected


def test_hashes_depend_on_every_entry_and_its_place():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, N, dtype=np.uint64)
    rows = np.stack([rng.choice(np.delete(np.arange(N), i), K, replace=False) for i in range(N)])
    before = neighbor_hashes(hashes, rows)
    assert len(set(before.tolist())) == N
    for column in range(K):
        changed = rows.copy()
        changed[3, column] = -1
        assert (np.flatnonzero(neighbor_hashes(hashes, changed) != before) == [3]).all()
        swapped = rows.copy()
        swapped[3, [column, (column + 1) % K]] = rows[3, [(column + 1) % K, column]]
        assert (np.flatnonzero(neighbor_hashes(hashes, swapped) != before) == [3]).all()
    other = hashes.copy()
    other[5] ^= np.uint64(1)  # its own row, and every row that has it as a neighbour
    assert (((rows == 5).any(axis=1) | (np.arange(N) == 5)) == (neighbor_hashes(other, rows) != before)).all()


# ---- the dataset


def test_columns_and_the_rest_of_the_dataset(neighborly):
    dataset = image_dataset(range(N))
    assert neighborly.column_names == [*dataset.column_names, "neighbors", "neighbors_hash"]
    assert neighborly.features["neighbors"] == datasets.List(datasets.Value("int32"))
    assert neighborly.features["neighbors_hash"] == datasets.Value("uint64")
    assert neighborly.select_columns(dataset.column_names).to_list() == dataset.to_list()
    assert neighborly.split == dataset.split
    pixels = np.stack([np.array(PIL.Image.open(io.BytesIO(p["bytes"]))) for p in dataset["picture"]])
    means = pixels.reshape(N, 2, 4, 2, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2).reshape(N, -1)
    assert (check_neighbors(neighborly) == brute_force(means, K)[2]).all()
    assert check_neighbors(neighborly).dtype == np.int32


def test_check_returns_the_nearest_of_a_larger_pool(neighborly):
    assert (check_neighbors(neighborly, 3) == check_neighbors(neighborly)[:, :3]).all()
    assert check_neighbors(neighborly, K).shape == (N, K)
    with pytest.raises(ValueError, match=f"^k_pool={K + 1}.*k_pool={K} or fewer"):
        check_neighbors(neighborly, K + 1)


def test_neighbors_follow_a_selection_made_before(tmp_path):
    """Row numbers are those of the dataset at hand, also where it is a shuffled view of a larger table."""
    rows = np.random.default_rng(0).permutation(N)[:15]
    chosen = image_dataset(range(N)).select(rows)
    one = add_neighbors(chosen, TinyBackbone(), "picture", k=4, cache_dir=tmp_path / "one")
    other = add_neighbors(image_dataset(rows), TinyBackbone(), "picture", k=4, cache_dir=tmp_path / "other")
    assert one.to_list() == other.to_list()
    assert (check_neighbors(one) == check_neighbors(other)).all()


def test_neighbors_are_replaced(neighborly, tmp_path):
    again = add_neighbors(neighborly, TinyBackbone(), "picture", k=3, cache_dir=tmp_path)
    assert again.column_names == neighborly.column_names
    assert (check_neighbors(again) == check_neighbors(neighborly)[:, :3]).all()


def test_add_refuses_what_it_cannot_do_before_any_work(tmp_path, passes):
    dataset = image_dataset(range(6))
    with pytest.raises(ValueError, match="^k=6.*k=5 or fewer"):
        add_neighbors(dataset, TinyBackbone(), "picture", k=6, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="image_hash.*load_images"):
        add_neighbors(dataset.remove_columns("image_hash"), TinyBackbone(), "picture", k=2, cache_dir=tmp_path)
    assert not passes


# ---- saved and loaded again


def through_disk(dataset, folder):
    dataset.save_to_disk(folder / "saved")
    return datasets.load_from_disk(folder / "saved")


def through_parquet(dataset, folder):
    embedded = dataset.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)  # bytes, not paths
    embedded.with_format(None).to_parquet(folder / "train.parquet")
    return datasets.load_dataset(
        "parquet", data_files=str(folder / "train.parquet"), split="train", cache_dir=str(folder)
    )


def as_signed(dataset, folder):
    """A format without unsigned numbers, and with wide integers: the same bits."""
    table = dataset.with_format("arrow")[:]
    signed = table["neighbors_hash"].to_numpy().view(np.int64)
    place = table.column_names.index("neighbors_hash")
    table = table.set_column(place, "neighbors_hash", [signed])
    return datasets.Dataset(table).cast_column("neighbors", datasets.List(datasets.Value("int64")))


@pytest.mark.parametrize("trip", [through_disk, through_parquet, as_signed])
def test_neighbors_survive_a_trip(neighborly, tmp_path, trip):
    back = trip(neighborly, tmp_path)
    found = check_neighbors(back)
    assert found.dtype == np.int32 and (found == check_neighbors(neighborly)).all()
    with pytest.raises(ValueError, match="filtered, shuffled"):
        check_neighbors(back.select(range(1, N)))


def test_file_backed_datasets(neighborly, tmp_path):
    """add_neighbors over a dataset on disk, and its result on to disk and to parquet."""
    on_disk = through_disk(image_dataset(range(N)), tmp_path)
    dataset = add_neighbors(on_disk, TinyBackbone(), "picture", k=K, cache_dir=tmp_path / "cache")
    for trip in (through_parquet, lambda d, folder: through_disk(d, folder / "again")):
        assert trip(dataset, tmp_path).to_list() == neighborly.to_list()
    fewer = add_neighbors(on_disk, TinyBackbone(), "picture", k=3, cache_dir=tmp_path / "cache")
    assert (check_neighbors(fewer) == check_neighbors(neighborly, 3)).all()
    assert fewer._fingerprint != dataset._fingerprint  # by it `map` finds what it wrote to disk before


def test_nothing_is_written_beside_the_images(tmp_path):
    """Also for a selection of a dataset on disk, whose columns can only be joined once it is written out anew."""
    on_disk = through_disk(image_dataset(range(N)), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    dataset = add_neighbors(on_disk.select([5, 3, 8, 1]), TinyBackbone(), "picture", k=2, cache_dir=tmp_path / "cache")
    assert check_neighbors(dataset).shape == (4, 2) and dataset["name"][:] == ["5.png", "3.png", "8.png", "1.png"]
    add_neighbors(on_disk, TinyBackbone(), "picture", k=2, cache_dir=tmp_path / "cache")
    assert sorted(p for p in tmp_path.rglob("*") if (tmp_path / "cache") not in (p, *p.parents)) == before


def test_nothing_is_written_next_to_images_of_other_splits(tmp_path):
    """They get columns of nulls."""
    on_disk = through_disk(image_dataset(range(N)), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    splits = ImageSplits(
        on_disk.select([5, 3, 8, 1]), on_disk.select([9, 7]), on_disk.select([2, 4]), "picture", None, []
    )
    result = splits_with_neighbors(splits, np.array([[1], [0], [3], [2]], np.int32), tmp_path / "cache")
    assert [result[name]["name"][:] for name in ("validation", "test")] == [["9.png", "7.png"], ["2.png", "4.png"]]
    assert result["test"]["neighbors"][:] == [None, None]
    assert sorted(p for p in tmp_path.rglob("*") if (tmp_path / "cache") not in (p, *p.parents)) == before


# ---- neighbours of other images


def edited(dataset):
    rows = dataset["neighbors"][:]
    rows[3] = rows[3][::-1]
    return dataset.remove_columns("neighbors").add_column("neighbors", rows, feature=dataset.features["neighbors"])


def repainted(dataset):
    return dataset.remove_columns("image_hash").add_column(
        "image_hash", image_hashes(image_dataset([*range(N - 1), 99])), feature=datasets.Value("uint64")
    )


MISUSES = {
    "select": lambda d: d.select(range(N - 1)),
    "select the same number": lambda d: d.select([*range(N - 1), 0]),
    "shuffle": lambda d: d.shuffle(seed=0),
    "swap two rows": lambda d: d.select([1, 0, *range(2, N)]),
    "filter": lambda d: d.filter(lambda name: name != "3.png", input_columns="name"),
    "join with itself": lambda d: datasets.concatenate_datasets([d, d]),
    "join with others": lambda d: datasets.concatenate_datasets([d, image_dataset(range(100, 110))]),
    "other neighbours": edited,
    "other images": repainted,
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_misuse_is_noticed(neighborly, misuse):
    with pytest.raises(ValueError, match="(?s)^neighbors_k: .*(joined|shuffled).*coss-hf neighbors"):
        check_neighbors(MISUSES[misuse](neighborly), K)


def test_a_file_of_no_neighbors(neighborly):
    for column in ("neighbors", "neighbors_hash"):
        with pytest.raises(ValueError, match=f"^neighbors_k.*{column};.*coss-hf neighbors"):
            check_neighbors(neighborly.remove_columns(column))
    for values in (
        ["a"] * N,
        [[0.5]] * N,
        [[1]] * (N - 1) + [[1, 2]],
        [[1]] * (N - 1) + [[]],
        [[1]] * (N - 1) + [[None]],
    ):
        with pytest.raises(ValueError, match="^neighbors_k.*same number of integers"):
            check_neighbors(neighborly.remove_columns("neighbors").add_column("neighbors", values))
    with pytest.raises(ValueError, match="image_hash.*load_images"):
        check_neighbors(neighborly.remove_columns("image_hash"))
