"""The teacher's nearest neighbours of every training image: search, storage, and the check that they belong.

The only file that imports faiss. `Dataset.map(num_proc=2)` hangs in a process that has used faiss or a torch matmul
(OpenMP and fork), so no `map` here, nor after `search` elsewhere, may ask for processes.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import datasets
import faiss
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from tqdm.auto import tqdm

from coss_hf.backbones import Backbone, embed_dataset
from coss_hf.images import ProcessedImages

logger = logging.getLogger(__name__)

NEIGHBORS, NEIGHBORS_HASH, IMAGE_HASH = "neighbors", "neighbors_hash", "image_hash"
CHUNK = 1024  # queries at a time: bounds the memory of a search, and is the step of its progress bar
GOLDEN, MASK = 0x9E3779B97F4A7C15, 2**64 - 1
REMEDY = (
    "compute them on these images with `python recipes/neighbors.py --teacher ... --dataset ... --neighbors_pool ... "
    "--output DIR` and give that folder as --dataset, or switch neighbours off with --neighbors_k 0"
)


def search(embeddings: torch.Tensor | np.ndarray, k: int) -> np.ndarray:
    """The k nearest other rows of every row by cosine, exactly: inner product of unit rows, in float32.

    Args:
        embeddings: (n, d) tensor or array. Rows of zeros are allowed; their similarity to everything is 0.
        k: neighbours a row, 1 <= k < n.

    Returns:
        (n, k) int32 array, the most similar first. A row never holds its own index, also where other rows equal it.

    Raises:
        ValueError: k out of range, or embeddings that are not (n, d) or not finite.
    """
    embeddings = torch.as_tensor(embeddings).detach()
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings: the shape is {tuple(embeddings.shape)}; give one row an image, (n, d).")
    n, dim = embeddings.shape
    check_pool(k, n)
    chunks = embeddings.split(CHUNK)
    bad = torch.cat([~chunk.isfinite().all(dim=1) for chunk in chunks]).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"embeddings: {len(bad)} of {n} rows hold NaN or infinity (rows {_some(bad)}); "
            "embed with --teacher_dtype float32, and look at these images if that does not help."
        )
    index = faiss.IndexFlatIP(dim)
    for chunk in chunks:
        index.add(_unit_rows(chunk))
    neighbors = np.empty((n, k), dtype=np.int32)
    with tqdm(total=n, desc="Searching neighbours", unit="img", leave=False) as progress:
        for start, chunk in zip(range(0, n, CHUNK), chunks, strict=True):
            found = index.search(_unit_rows(chunk), k + 1)[1]
            # Duplicates tie with the row itself and may push it down or off the end: only the index tells which it is.
            own = found == np.arange(start, start + len(chunk))[:, None]
            own[~own.any(axis=1), -1] = True
            neighbors[start : start + len(chunk)] = found[~own].reshape(-1, k)
            progress.update(len(chunk))
    return neighbors


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


def add_neighbors(
    dataset: datasets.Dataset,
    backbone: Backbone,
    image_column: str,
    *,
    k: int,
    cache_dir: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> datasets.Dataset:
    """Add every image's k nearest others, as the backbone embeds them un-augmented, to a dataset of `load_images`.

    Args:
        dataset: n rows with columns `image_column` and `image_hash`. Neighbours that it already carries are replaced.
        backbone: the teacher, a `coss_hf.backbones.Backbone`.
        k: neighbours an image, 1 <= k < n.
        cache_dir: where neighbours are kept from run to run, found again by images (in order), backbone and k;
            `coss_hf` in the cache of datasets by default. Concurrent callers are safe.
        batch_size, num_workers: of the embedding pass.

    Returns:
        An ordinary dataset with the columns `neighbors` (List(int32), the nearest first) and `neighbors_hash` (uint64).

    Raises:
        ValueError: k out of range, `image_hash` missing, or embeddings that are not finite.
    """
    check_pool(k, len(dataset))
    image_hash = _hashes(dataset)
    key = hashlib.sha256(image_hash.astype("<u8").tobytes() + f"{backbone.fingerprint()} {k}".encode()).hexdigest()
    folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "coss_hf") / key[:32]
    folder.parent.mkdir(parents=True, exist_ok=True)
    neighbors = _read(folder)
    if neighbors is not None:
        logger.info("Neighbours: %d of each of %d images, found in the cache %s", k, len(dataset), folder)
    else:
        start = time.perf_counter()
        images = ProcessedImages(dataset, image_column, backbone.preprocess)
        embeddings = embed_dataset(
            backbone, images, batch_size=batch_size, num_workers=num_workers, description="Embedding for neighbours"
        )
        neighbors = search(embeddings, k)
        meta = {
            "images": len(dataset),
            "dim": embeddings.shape[1],
            "neighbors": k,
            "teacher": backbone.name,
            "pooling": backbone.pooling,
            "seconds": round(time.perf_counter() - start, 3),
            "versions": {"faiss": faiss.__version__}
            | {name: version(name) for name in ("torch", "transformers", "datasets", "pillow")},
        }
        _write(folder, neighbors, meta)
        logger.info("Neighbours: %(neighbors)d of each of %(images)d images (%(dim)d numbers) in %(seconds).1f s", meta)

    row_hashes = neighbor_hashes(image_hash, neighbors)
    features = datasets.Features(
        {NEIGHBORS: datasets.List(datasets.Value("int32")), NEIGHBORS_HASH: datasets.Value("uint64")}
    )
    dataset = dataset.remove_columns([name for name in features if name in dataset.column_names])
    if dataset._indices is not None:  # joining columns writes a selection out anew: here, not in the user's own folder
        dataset = dataset.flatten_indices(cache_file_name=str(folder.parent / f"{dataset._fingerprint}.arrow"))
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
        raise ValueError(f"--neighbors_k: the dataset has no column {' and '.join(missing)}; {REMEDY}.")
    neighbors, stored = _lists(dataset), _column(dataset, NEIGHBORS_HASH)
    n, size = neighbors.shape
    # int64 holds the same 64 bits where a format has no unsigned numbers; a joined column may hold nulls (float64).
    if stored.dtype in (np.uint64, np.int64):
        bad = (stored.view(np.uint64) != neighbor_hashes(_hashes(dataset), neighbors)).nonzero()[0].tolist()
    else:
        bad = range(n)
    if bad:
        raise ValueError(
            f"--neighbors_k: the neighbours of {len(bad)} of {n} rows (rows {_some(bad)}) are not those of the images "
            f"at hand: the dataset was filtered, shuffled, joined or its images changed after the search; {REMEDY}."
        )
    if k_pool is not None and k_pool > size:
        raise ValueError(
            f"--neighbors_pool {k_pool}: the dataset carries {size} neighbours an image; "
            f"use --neighbors_pool {size} or fewer, or make more with recipes/neighbors.py --neighbors_pool {k_pool}."
        )
    return neighbors[:, :k_pool]


def check_pool(k: int, n: int) -> None:
    """Raises ValueError unless each of ``n`` images has ``k`` others."""
    if k < 1:
        raise ValueError(f"--neighbors_pool {k}: use 1 or more; --neighbors_k 0 switches neighbours off.")
    if k >= n:
        raise ValueError(
            f"--neighbors_pool {k}: {n} images have at most {n - 1} others each; "
            + (f"use --neighbors_pool {n - 1} or fewer, or more images." if n > 1 else "use more images.")
        )


def _some(rows: Sequence[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _unit_rows(rows: torch.Tensor) -> np.ndarray:
    """(b, d) tensor -> float32 array of unit rows; float64 inside, so that no square overflows or vanishes."""
    rows = rows.to("cpu", torch.float64)
    norms = rows.norm(dim=1, keepdim=True)
    return (rows / torch.where(norms > 0, norms, 1.0)).float().numpy()


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _table_column(dataset: datasets.Dataset, name: str) -> pyarrow.ChunkedArray:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def _column(dataset: datasets.Dataset, name: str) -> np.ndarray:
    return _table_column(dataset, name).to_numpy()


def _hashes(dataset: datasets.Dataset) -> np.ndarray:
    if IMAGE_HASH not in dataset.column_names:
        raise ValueError(
            f"dataset: no column {IMAGE_HASH}; load the images with coss_hf.images.load_images, which adds it."
        )
    return _column(dataset, IMAGE_HASH).view(np.uint64)


def _lists(dataset: datasets.Dataset) -> np.ndarray:
    """The column `neighbors` as an (n, K) int32 array, taken flat from Arrow: a Python list a row would be slow."""
    column = _table_column(dataset, NEIGHBORS)
    try:
        values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
        lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(column)).to_pylist()
    except (AttributeError, pyarrow.ArrowException):
        values, lengths = np.empty(0, dtype=object), []
    if len(lengths) != 1 or values.dtype.kind != "i":
        raise ValueError(
            f"--neighbors_k: the column neighbors ({dataset.features[NEIGHBORS]}) does not hold the same number of "
            f"integers in every row: another dataset was joined, or the column is not of coss_hf; {REMEDY}."
        )
    return values.astype(np.int32).reshape(len(column), lengths[0])


def _read(folder: Path) -> np.ndarray | None:
    """The neighbours kept in `folder`; None where there are none, or where they are damaged."""
    if not folder.exists():
        return None
    try:
        checksum = json.loads((folder / "meta.json").read_text())["sha256"]
        with open(folder / "neighbors.npy", "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == checksum:
                file.seek(0)
                return np.load(file)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    logger.warning("The cached neighbours in %s are damaged: they are computed again.", folder)
    return None


def _write(folder: Path, neighbors: np.ndarray, meta: dict) -> None:
    """Keep neighbours in `folder`, which is there whole or not at all, whatever other processes do meanwhile."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".writing-") as temporary:
            entry = Path(temporary) / "entry"
            entry.mkdir()
            np.save(entry / "neighbors.npy", neighbors)
            with open(entry / "neighbors.npy", "rb") as file:
                meta = meta | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
            (entry / "meta.json").write_text(json.dumps(meta, indent=2))
            if folder.exists():
                os.replace(folder, Path(temporary) / "replaced")  # damaged, or just written by another process
            os.replace(entry, folder)
    except OSError as error:  # the disk is full, or another process was faster: the search is done and can be used
        logger.warning("The neighbours were not kept in %s: %s", folder, error)
