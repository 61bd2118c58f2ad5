"""Approximate search by a faiss index on disk. The only file that imports faiss."""

from pathlib import Path

import faiss
import numpy as np
from tqdm.auto import tqdm

from coss_hf.neighbors.embedding_store import Vectors, atomic_file
from coss_hf.neighbors.exact_search import CHUNK, ExactSearch
from coss_hf.neighbors.recall import random_rows
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

FAISS_VERSION = faiss.__version__
TRIES = 6  # deeper searches for a row that is short of neighbours, before an exact one
HNSW_LINKS = 32
HNSW_MAX_PROBES = 8192


class IndexSearch:
    """Approximate search with a faiss index; called as `ExactSearch` is.

    Rows that it leaves short of neighbours are searched deeper, at last exactly.

    Args:
        kind: "ivf" (about 4 sqrt(n) inverted lists) or "hnsw" (a graph; built on one thread, since the order of
            insertion decides it).
        vectors: (n, d); the index holds a copy of their dtype.
        path: file of the index; built where it is not there yet, or damaged.

    Attributes:
        probes: Number of lists (ivf) or candidates (hnsw) that are searched for a query.
        max_probes: Largest useful number of them.
    """

    def __init__(self, kind: str, vectors: Vectors, path: Path):
        self.kind = kind
        self.vectors = vectors
        self.exact = ExactSearch(vectors)
        self.index = read_index(kind, vectors, path)
        if self.index is None:
            build_index(kind, vectors, path)
            self.index = read_index(kind, vectors, path)
        n = vectors.shape[0]
        self.max_probes = self.index.nlist if kind == "ivf" else min(n, HNSW_MAX_PROBES)
        self.probes = min(8 if kind == "ivf" else 64, self.max_probes)

    def __call__(self, rows: np.ndarray, k: int, max_similarity: float = float("inf")) -> tuple[np.ndarray, np.ndarray]:
        """As `ExactSearch.__call__`, of which most are found."""
        found = np.full((len(rows), k), -1)
        similarity = np.full((len(rows), k), -np.inf, np.float32)
        queries = self.vectors.take(rows)
        self.vectors.release()
        short = np.arange(len(rows))
        depth = k + 1
        probes = self.probes
        for _ in range(TRIES):
            if self.kind == "ivf":
                parameters = faiss.SearchParametersIVF(nprobe=probes)
            else:
                parameters = faiss.SearchParametersHNSW(efSearch=max(probes, depth))
            values, columns = self.index.search(queries[short], depth, params=parameters)
            # Duplicates tie with the row itself and may push it down or off the end: only the number tells which it is.
            good = (columns >= 0) & (columns != rows[short, None]) & (values < max_similarity)
            order = np.argsort(~good, axis=1, kind="stable")[:, :k]
            good = np.take_along_axis(good, order, axis=1)
            found[short, : good.shape[1]] = np.where(good, np.take_along_axis(columns, order, axis=1), -1)
            similarity[short, : good.shape[1]] = np.where(good, np.take_along_axis(values, order, axis=1), -np.inf)
            short = short[found[short, -1] < 0]
            if not len(short):
                return found, similarity
            depth = min(2 * depth, self.index.ntotal)
            probes = min(2 * probes, self.max_probes)
        found[short], similarity[short] = self.exact(rows[short], k, max_similarity)
        return found, similarity


def read_index(kind: str, vectors: Vectors, path: Path):
    """A faiss index of all vectors; None, and a word of warning, where the file is not what was written."""
    if not path.exists():
        return None
    try:
        # Of a file that is too short faiss would map what is not there, and the process die when it is read.
        if path.stat().st_size == int(_size_of(path).read_text()):
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP if kind == "ivf" else 0)
            if (index.ntotal, index.d) == vectors.shape:
                return index
    except (OSError, ValueError, RuntimeError):
        pass
    logger.warning("The index %s is damaged: it is built again.", path)
    return None


def _size_of(path: Path) -> Path:
    """Holds the number of bytes of an index."""
    return path.with_suffix(".size")


def build_index(kind: str, vectors: Vectors, path: Path) -> None:
    """Writes a faiss index of all vectors, which is there complete or not at all."""
    n = vectors.shape[0]
    threads = faiss.omp_get_max_threads()
    if kind == "hnsw":
        index = _empty_hnsw(vectors)
        sample = np.arange(min(n, CHUNK))
        faiss.omp_set_num_threads(1)
    else:
        lists = max(1, min(round(4 * n**0.5), n // 39))  # k-means wants 39 rows a list
        index = _empty_ivf(vectors, lists)
        sample = random_rows(n, 64 * lists)
    try:
        index.train(vectors.take(sample))
        vectors.release()
        for _, block in tqdm(vectors.blocks(65_536), desc="Indexing", total=-(-n // 65_536), leave=False):
            index.add(block)
            vectors.release()
    finally:
        faiss.omp_set_num_threads(threads)
    with atomic_file(path) as temporary:
        faiss.write_index(index, str(temporary))
        _size_of(path).write_text(str(temporary.stat().st_size))


def _empty_hnsw(vectors: Vectors):
    dim = vectors.shape[1]
    if vectors.dtype == np.float16:
        return faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    return faiss.IndexHNSWFlat(dim, HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)


def _empty_ivf(vectors: Vectors, lists: int):
    dim = vectors.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    if vectors.dtype == np.float16:
        codes = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, lists, codes, faiss.METRIC_INNER_PRODUCT, False)
    else:
        index = faiss.IndexIVFFlat(quantizer, dim, lists, faiss.METRIC_INNER_PRODUCT)
    return index
