"""The dataset columns that hold neighbours, and the check that they belong to the images at hand."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.compute

from coss_hf.data.rows import without_selection
from coss_hf.utils.messages import command_to, parameter_names

NEIGHBORS = "neighbors"
NEIGHBORS_HASH = "neighbors_hash"
IMAGE_HASH = "image_hash"
GOLDEN = 0x9E3779B97F4A7C15
MASK = 2**64 - 1


def remedy() -> str:
    """What to do about neighbours that are not those of the images."""
    return (
        f"compute them on these images with `{command_to('neighbors')} --teacher ... --dataset ... --neighbors_pool "
        f"... --output DIR` and give that folder as --dataset, or switch neighbours off with --neighbors_k 0"
    )


def neighbor_hashes(image_hash: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """One 64-bit number a row that changes with the row's image, its neighbours' images, their order, or the row count.

    Row numbers mean nothing by themselves once rows are selected, shuffled or joined, so what is hashed is the content
    that they point to. The same on every platform (splitmix64's finaliser, chained over the columns).

    Args:
        image_hash: (n,) uint64, the images' content hashes.
        neighbors: (n, K) integers, row numbers; -1 pads.

    Returns:
        (n,) uint64.
    """
    image_hash = np.asarray(image_hash, dtype=np.uint64)
    n = len(image_hash)
    state = _mix(image_hash ^ np.uint64(n * GOLDEN & MASK))
    for column in np.asarray(neighbors).T:
        column = column.astype(np.int64)
        inside = (column >= 0) & (column < n)
        content = np.where(inside, image_hash[np.where(inside, column, 0)], column.astype(np.uint64))
        state = _mix((state + np.uint64(GOLDEN)) ^ content)
    return state


def with_columns(dataset: datasets.Dataset, neighbors: np.ndarray, folder: Path) -> datasets.Dataset:
    """The dataset, n rows, with columns of its neighbours (n, K). `folder`: for what has to be written anew."""
    row_hashes = neighbor_hashes(image_hashes(dataset), neighbors)
    features = datasets.Features(
        {NEIGHBORS: datasets.List(datasets.Value("int32")), NEIGHBORS_HASH: datasets.Value("uint64")}
    )
    dataset = dataset.remove_columns([name for name in features if name in dataset.column_names])
    dataset = without_selection(dataset, folder)
    # Mapped over one narrow column and joined, since a map over all of them would write every image's bytes once more.
    columns = dataset.select_columns([IMAGE_HASH]).map(
        lambda _, rows: {NEIGHBORS: neighbors[rows], NEIGHBORS_HASH: row_hashes[rows]},
        with_indices=True,
        batched=True,
        remove_columns=[IMAGE_HASH],
        features=features,
        keep_in_memory=True,
        new_fingerprint=hashlib.sha256(row_hashes.astype("<u8").tobytes()).hexdigest()[:16],
        desc="Adding neighbours",
    )
    return datasets.concatenate_datasets([dataset, columns], split=dataset.split, axis=1)


@parameter_names(neighbors_pool="k_pool")
def check_neighbors(dataset: datasets.Dataset, k_pool: int | None = None) -> np.ndarray:
    """The neighbours that a dataset carries, once they are seen to belong to the images at hand.

    Args:
        dataset: n rows with `image_hash` as `load_images` computes it, `neighbors` and `neighbors_hash`.
        k_pool: how many neighbours an image are wanted; the nearest are returned. All by default.

    Returns:
        (n, k_pool) int32 array of row numbers, the nearest first; -1 pads.

    Raises:
        ValueError: no such columns, fewer neighbours than asked, or neighbours of other images: the dataset was
            filtered, shuffled, joined or its images changed after the search.
    """
    missing = [name for name in (NEIGHBORS, NEIGHBORS_HASH) if name not in dataset.column_names]
    if missing:
        raise ValueError(f"--neighbors_k: the dataset has no column {' and '.join(missing)}; {remedy()}.")
    neighbors = _lists(dataset)
    stored = _column(dataset, NEIGHBORS_HASH)
    n, size = neighbors.shape
    # int64 holds the same 64 bits where a format has no unsigned numbers; a joined column may hold nulls (float64).
    if stored.dtype in (np.uint64, np.int64):
        bad = (stored.view(np.uint64) != neighbor_hashes(image_hashes(dataset), neighbors)).nonzero()[0].tolist()
    else:
        bad = range(n)
    if bad:
        raise ValueError(
            f"--neighbors_k: the neighbours of {len(bad)} of {n} rows (rows {some(bad)}) are not those of the images "
            f"at hand: the dataset was filtered, shuffled, joined or its images changed after the search; {remedy()}."
        )
    if k_pool is not None and k_pool > size:
        raise ValueError(
            f"--neighbors_pool {k_pool}: the dataset carries {size} neighbours an image; use --neighbors_pool {size} "
            f"or fewer, or make more with `{command_to('neighbors')} --neighbors_pool {k_pool}`."
        )
    return neighbors[:, :k_pool]


def check_pool(k: int, n: int) -> None:
    """Raises ValueError unless each of ``n`` images has ``k`` others."""
    if k < 1:
        raise ValueError(f"--neighbors_pool {k}: use 1 or more, the number of neighbours to find for each image.")
    if k >= n:
        raise ValueError(
            f"--neighbors_pool {k}: {n} images have at most {n - 1} others each; "
            + (f"use --neighbors_pool {n - 1} or fewer, or more images." if n > 1 else "use more images.")
        )


def summary(meta: dict) -> str:
    """One line on how neighbours were found; of one from an earlier version, what it says."""
    meta = {"search": "exact"} | meta
    text = "Neighbours: {neighbors} of each of {images:,} images ({dim} numbers), {search}".format_map(meta)
    if "search_asked" in meta:  # exact search was quicker than as many probes
        text += " in place of {search_asked}".format_map(meta)
    elif "recall" in meta:
        text += " with {probes} probes: recall {recall:.4f} on {recall_queries:,} queries".format_map(meta)
    if meta.get("fewer"):
        text += "; near-duplicates left out, {fewer:,} images have fewer, {none:,} of them none".format_map(meta)
    return text + f"; {meta['seconds']:.1f} s"


def some(rows: Sequence[int]) -> str:
    """The first five row numbers, for a message."""
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _table_column(dataset: datasets.Dataset, name: str) -> pyarrow.ChunkedArray:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def _column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    return _table_column(dataset, name).to_numpy()


def image_hashes(dataset: datasets.Dataset) -> np.ndarray:
    """The content hashes ``(n,)`` of a dataset's images, uint64.

    Raises:
        ValueError: the dataset has no such column.
    """
    if IMAGE_HASH not in dataset.column_names:
        raise ValueError(f"dataset: no column {IMAGE_HASH}; load the images with coss_hf.load_images, which adds it.")
    return _column(dataset, IMAGE_HASH).view(np.uint64)


def _lists(dataset: datasets.Dataset) -> np.ndarray:
    """The column `neighbors` as an (n, K) int32 array, taken flat from Arrow: a Python list a row would be slow."""
    column = _table_column(dataset, NEIGHBORS)
    try:
        values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(column)).to_pylist()
    except (AttributeError, pyarrow.ArrowException):
        values = np.empty(0, dtype=object)
        lengths = []
    if len(lengths) != 1 or values.dtype.kind != "i":
        raise ValueError(
            f"--neighbors_k: the column neighbors ({dataset.features[NEIGHBORS]}) does not hold the same number of "
            f"integers in every row: another dataset was joined, or the column is not of coss_hf; {remedy()}."
        )
    return values.astype(np.int32).reshape(len(column), lengths[0])
