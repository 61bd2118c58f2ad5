"""The teacher's nearest neighbours of every training image: exact or by an index of measured recall, on any number of
processes.

`Dataset.map(num_proc=2)` hangs in a process that has used faiss or a torch matmul
(OpenMP and fork), so no `map` here, nor after a search elsewhere, may ask for processes.
"""

import contextlib
import hashlib
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch
from filelock import FileLock

from coss_hf.data.processed_images import ProcessedImages
from coss_hf.data.reading import ImageReader
from coss_hf.models.backbone import Backbone
from coss_hf.neighbors.cache import read_neighbors, write_neighbors
from coss_hf.neighbors.columns import check_pool, image_hashes, some, summary, with_columns
from coss_hf.neighbors.embedding_store import Vectors, embed_shards, unit_rows, unwritable
from coss_hf.neighbors.exact_search import CHUNK, ExactSearch, search_all
from coss_hf.neighbors.faiss_index import FAISS_VERSION, IndexSearch
from coss_hf.neighbors.options import ROUNDING, SearchOptions
from coss_hf.neighbors.recall import raise_probes
from coss_hf.utils.messages import get_logger, parameter_names
from coss_hf.utils.process_group import Processes
from coss_hf.utils.vectors import rows_not_finite

logger = get_logger(__name__)

EXACT_UP_TO = {"cpu": 100_000, "cuda": 1_000_000}  # images; beyond, `auto` takes ivf
# Share of its lists beyond which ivf is slower than exact search: 15 against 51 billion operations per second and core.
QUICKER_EXACT = 0.3
PACKAGES = ("torch", "transformers", "datasets", "pillow")


@parameter_names(neighbors_pool="k")
def search(embeddings: torch.Tensor | np.ndarray, k: int, *, max_similarity: float = float("inf")) -> np.ndarray:
    """The k nearest other rows of every row by cosine, exactly: inner product of unit rows, in float32.

    Args:
        embeddings: (n, d) tensor or array. Rows of zeros are allowed; their similarity to everything is 0.
        k: Number of neighbours per row, 1 <= k < n.
        max_similarity: Rows as similar as this or more are left out; 1e-6 less, which rounding may take from the
            similarity of equal rows, counts as this.

    Returns:
        (n, k) int32 array, the most similar first; -1 where `max_similarity` leaves fewer. A row never holds its own
        index, also where other rows equal it.

    Raises:
        ValueError: k out of range, or embeddings that are not (n, d) or not finite.
    """
    embeddings = torch.as_tensor(embeddings).detach()
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings: the shape is {tuple(embeddings.shape)}; give one row an image, (n, d).")
    check_pool(k, len(embeddings))
    if bad := rows_not_finite(embeddings):
        raise ValueError(
            f"embeddings: {len(bad)} of {len(embeddings)} rows hold NaN or infinity (rows {some(bad)}); embed in "
            f"float32, and look at these images if that does not help."
        )
    units = torch.cat([unit_rows(chunk) for chunk in embeddings.split(CHUNK)])
    searcher = ExactSearch(Vectors([units.numpy()]), embeddings.device)
    return search_all(searcher, k, max_similarity - ROUNDING["float32"])


@parameter_names(neighbors_pool="k", neighbors_cache="cache_dir")
def nearest_neighbors(
    dataset: datasets.Dataset,
    backbone: Backbone,
    image_column: str,
    *,
    k: int,
    options: SearchOptions | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    on_bad_image: str = "error",
) -> tuple[np.ndarray, dict]:
    """Every image's k nearest others, as the backbone embeds them un-augmented. All processes of a run call together:
    each embeds and searches its share.

    Arguments as of `add_neighbors`, and:

    Args:
        on_bad_image: what to do where an image can no longer be decoded. "error"; or "skip": another one is embedded in
            its place, the one that takes its place in training, see `ImageReader`.

    Returns:
        (n, k) int32 row numbers, the nearest first, -1 where `--neighbors_max_similarity` leaves fewer; and how they
        were found: search, recall, seconds, ..., as kept in the cache's `meta.json`.

    Raises:
        ValueError: k out of range, `image_hash` missing, embeddings that are not finite, a cache that cannot be
            written, or no neighbour left for any image.
        UnreadableImage: an image can no longer be decoded.
    """
    options = options or SearchOptions()
    processes = Processes()
    check_pool(k, len(dataset))
    search = (backbone, image_column, k, options, cache_dir, batch_size, num_workers, processes)
    try:
        return _cached_or_mined(dataset, *search)
    except ValueError:  # on all processes, whichever met the image
        rows = None
        if on_bad_image == "skip":
            rows = _rows_to_read(dataset, image_column, processes)
        if rows is None:
            raise
    # With the hashes of what is embedded, so that the cache never takes one image for another.
    return _cached_or_mined(dataset.select(rows), *search)


def _rows_to_read(dataset: datasets.Dataset, image_column: str, processes: Processes) -> list[int] | None:
    """The row of each image, or of the one in its place; None where all can be decoded. The same on all processes."""
    rows = None
    with processes.together():
        if processes.rank == 0:
            reader = ImageReader(dataset, image_column, "skip")
            rows = reader.rows_to_read()
            if not reader.replaced():
                rows = None
    return processes.gather(rows)[0]


def _cached_or_mined(
    dataset: datasets.Dataset,
    backbone: Backbone,
    image_column: str,
    k: int,
    options: SearchOptions,
    cache_dir: str | Path | None,
    batch_size: int,
    num_workers: int,
    processes: Processes,
) -> tuple[np.ndarray, dict]:
    entry = _cache_entry(dataset, backbone, k, options, cache_folder(cache_dir))
    with contextlib.ExitStack() as stack:
        with processes.together():
            kept = None
            if processes.rank == 0:
                kept = read_neighbors(entry.folder)
            if processes.rank == 0 and kept is None:
                # One run at a time embeds; a second finds the result of the first.
                _lock(entry, stack)
                kept = read_neighbors(entry.folder)
        if not processes.gather(kept is not None)[0]:
            images = ProcessedImages(dataset, image_column, backbone.preprocess)
            kept = _mine(images, backbone, k, options, entry, batch_size, num_workers, processes)
        elif processes.rank == 0:
            logger.info("%s; found in the cache %s", summary(kept[1]), entry.folder)
        with processes.together():
            kept = kept or read_neighbors(entry.folder)
            if kept is None:
                raise ValueError(
                    f"--neighbors_cache {entry.folder.parent}: process {processes.rank} finds no neighbours there; "
                    f"give a folder that all machines share, and free some space on its disk."
                )
    return kept


class CacheEntry(NamedTuple):
    """Where the neighbours of a call are kept, and what is found there.

    Attributes:
        folder: Of the neighbours; known by images, backbone, k and options.
        work: Of the embeddings and the index; known by images, backbone and data type.
        kind: exact, ivf or hnsw.
        settings: Options that decide which neighbours are found, as kept in `meta.json`.
    """

    folder: Path
    work: Path
    kind: str
    settings: dict


def _cache_entry(
    dataset: datasets.Dataset, backbone: Backbone, k: int, options: SearchOptions, cache: Path
) -> CacheEntry:
    hashes = image_hashes(dataset).astype("<u8").tobytes()
    # Networks without code of their own keep the key that they had.
    fingerprint = f"{backbone.fingerprint()} {backbone.code()}".rstrip()
    kind = options.neighbors_search
    if kind == "auto":
        device = next(backbone.model.parameters()).device
        kind = "exact" if len(dataset) <= EXACT_UP_TO.get(device.type, 0) else "ivf"
    settings = {"dtype": options.neighbors_dtype, "max_similarity": options.neighbors_max_similarity, "search": kind}
    if kind != "exact":
        settings["recall_asked"] = options.neighbors_recall
    # Only what differs from the defaults is part of the key: caches of versions without these options stay valid.
    plain = {"dtype": "float32", "max_similarity": None, "search": "exact"}
    changed = [f" {name}={value}" for name, value in settings.items() if plain.get(name, ...) != value]

    def digest(key: str) -> str:
        return hashlib.sha256(hashes + key.encode()).hexdigest()[:32]

    return CacheEntry(
        folder=cache / digest(f"{fingerprint} {k}" + "".join(changed)),
        work=cache / f"embeddings-{digest(f'{fingerprint} {options.neighbors_dtype}')}",
        kind=kind,
        settings=settings,
    )


def _lock(entry: CacheEntry, stack: contextlib.ExitStack) -> None:
    """Locks the entry's embeddings until the stack is left. Raises ValueError where the cache cannot be written."""
    try:
        entry.folder.parent.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(FileLock(entry.work.with_suffix(".lock")))
    except OSError as error:
        raise unwritable(entry.work / "lock", error) from error
    stack.callback(Path(lock.lock_file).unlink, missing_ok=True)


def _mine(
    images: ProcessedImages,
    backbone: Backbone,
    k: int,
    options: SearchOptions,
    entry: CacheEntry,
    batch_size: int,
    num_workers: int,
    processes: Processes,
) -> tuple[np.ndarray, dict] | None:
    """Embeds and searches, each process its share, and keeps the result; returned on process 0, None on the others."""
    start = time.perf_counter()
    vectors = embed_shards(
        backbone,
        images,
        entry.work,
        dtype=options.neighbors_dtype,
        batch_size=batch_size,
        num_workers=num_workers,
        processes=processes,
    )
    embedded = time.perf_counter()
    device = next(backbone.model.parameters()).device
    neighbors, found = search_vectors(vectors, k, entry.kind, options, entry.work, device, processes)
    end = time.perf_counter()
    kept = None
    with processes.together():
        if processes.rank == 0:
            meta = _meta(neighbors, options) | entry.settings | found
            meta["dim"] = backbone.dim
            meta["teacher"] = backbone.name
            meta["pooling"] = backbone.pooling
            meta["processes"] = processes.count
            meta["seconds_embedding"] = round(embedded - start, 3)
            meta["seconds_search"] = round(end - embedded, 3)
            meta["seconds"] = round(end - start, 3)
            kept = neighbors, meta
            if write_neighbors(entry.folder, neighbors, meta) and not options.neighbors_keep_embeddings:
                shutil.rmtree(entry.work, ignore_errors=True)
            logger.info("%s", summary(meta))
    return kept


def search_vectors(
    vectors: Vectors,
    k: int,
    kind: str,
    options: SearchOptions,
    work: Path,
    device: torch.device | str = "cpu",
    processes: Processes | None = None,
) -> tuple[np.ndarray, dict]:
    """Searches the neighbours of all vectors, each process its share.

    Args:
        vectors: (n, d).
        k: Number of neighbours per row.
        kind: exact, ivf or hnsw.
        options: Target recall and maximal similarity.
        work: Folder for index and parts, seen by all processes.
        device: Device of an exact search.
        processes: Processes of the run; all of them must call.

    Returns:
        (n, k) int32, on process 0 (others get their share); and on all what was measured: lists, probes, recall.
    """
    processes = processes or Processes(alone=True)
    if kind == "exact":
        return search_all(ExactSearch(vectors, device), k, options.max_similarity, work, processes), {}
    searcher = _open_index(vectors, kind, work, processes)
    recall, queries = raise_probes(searcher, k, options.max_similarity, options.neighbors_recall, processes)
    found = {"recall": round(recall, 5), "recall_queries": queries, "probes": searcher.probes}
    if kind == "ivf":
        found["lists"] = searcher.max_probes
    if kind == "ivf" and searcher.probes > QUICKER_EXACT * searcher.max_probes:
        if processes.rank == 0:
            logger.info(
                "Neighbours: ivf needs %d of %d lists for recall %.4f, and exact search is quicker: taken instead",
                searcher.probes,
                searcher.max_probes,
                recall,
            )
        found |= {"search": "exact", "search_asked": kind, "recall": 1.0}
        searcher = ExactSearch(vectors, device)
    elif recall < options.neighbors_recall and processes.rank == 0:
        logger.warning(
            "Neighbours: recall %.4f with %d probes, the most there are, stays below --neighbors_recall %g; use "
            "--neighbors_search exact or %s.",
            recall,
            searcher.probes,
            options.neighbors_recall,
            "ivf" if kind == "hnsw" else "hnsw",
        )
    return search_all(searcher, k, options.max_similarity, work, processes), found


def _open_index(vectors: Vectors, kind: str, work: Path, processes: Processes) -> IndexSearch:
    """The index in `work`, which process 0 builds where it is not there yet."""
    path = work / f"{kind}.index"
    searcher = None
    with processes.together():
        if processes.rank == 0:
            searcher = IndexSearch(kind, vectors, path)
    return searcher or IndexSearch(kind, vectors, path)


def _meta(neighbors: np.ndarray, options: SearchOptions) -> dict:
    n, k = neighbors.shape
    alone = int((neighbors[:, 0] < 0).sum())
    if alone == n:
        raise ValueError(
            f"--neighbors_max_similarity {options.neighbors_max_similarity} leaves no image any neighbour; raise it."
        )
    fewer = int((neighbors[:, -1] < 0).sum())
    versions = {name: version(name) for name in PACKAGES} | {"faiss": FAISS_VERSION}
    return {"images": n, "neighbors": k, "fewer": fewer, "none": alone, "versions": versions}


@parameter_names(neighbors_pool="k", neighbors_cache="cache_dir")
def add_neighbors(
    dataset: datasets.Dataset,
    backbone: Backbone,
    image_column: str,
    *,
    k: int,
    options: SearchOptions | None = None,
    cache_dir: str | Path | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
) -> datasets.Dataset:
    """Add every image's k nearest others, as the backbone embeds them un-augmented, to a dataset of `load_images`.

    Embeddings go to disk, shard by shard (`embeddings-...` next to the cached neighbours): a run that was stopped
    resumes from there. They are removed once the neighbours are kept, unless the options say otherwise.

    Args:
        dataset: n rows with columns `image_column` and `image_hash`. Neighbours that it already carries are replaced.
        backbone: the teacher, a `coss_hf.models.backbone.Backbone`.
        image_column: the name of the column of the images.
        k: neighbours an image, 1 <= k < n.
        options: search, recall, near-duplicates, dtype; by default exact up to 100,000 images.
        cache_dir: where neighbours are kept from run to run, found again by images (in order), backbone, k and options;
            `coss_hf` in the cache of datasets by default. Concurrent callers are safe.
        batch_size: images per forward pass.
        num_workers: number of processes that decode images.

    Returns:
        An ordinary dataset with the columns `neighbors` (List(int32), the nearest first, -1 padding what
        `neighbors_max_similarity` leaves out) and `neighbors_hash` (uint64).

    Raises:
        ValueError: `k` out of range, a dataset without `image_hash`, or options that leave no image any neighbour.
        UnreadableImage: an image can no longer be decoded.
        NonFiniteEmbedding: the backbone gives NaN or infinity for an image.
    """
    neighbors, _ = nearest_neighbors(
        dataset,
        backbone,
        image_column,
        k=k,
        options=options,
        cache_dir=cache_dir,
        batch_size=batch_size,
        num_workers=num_workers,
    )
    return with_columns(dataset, neighbors, cache_folder(cache_dir))


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Where neighbours are kept."""
    return Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "coss_hf")
