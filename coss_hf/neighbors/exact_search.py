"""Exact nearest neighbours, the recall of approximate ones, and how processes share the queries out."""

import contextlib
from pathlib import Path

import numpy as np
import torch

from coss_hf.neighbors.embedding_store import Vectors, progress_bar, save_array
from coss_hf.utils.messages import get_logger
from coss_hf.utils.process_group import Processes
from coss_hf.utils.topk import blocked_topk

logger = get_logger(__name__)

CHUNK = 1024  # queries at a time, and what processes share out: the result must not depend on their number
BLOCK = 16_384  # rows compared at a time: with 1,024 queries 64 MiB of similarities

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@contextlib.contextmanager
def full_float32():
    """No TF32 in products on a GPU, which --tf32 and --torch_compile switch on for all of a process: similarities
    would be off by 1e-3, and the cache would keep what was found."""
    matmul = torch.backends.cuda.matmul
    if TORCH >= (2, 9):
        name, full = "fp32_precision", "ieee"
    else:
        name, full = "allow_tf32", False
    before = getattr(matmul, name)
    setattr(matmul, name, full)
    try:
        yield
    finally:
        setattr(matmul, name, before)


class ExactSearch:
    """Exact search among unit rows by inner product, in memory bounded by a block.

    On a CPU torch's product and `topk` take half the time of faiss' exact index, which moreover holds a copy of all.

    Args:
        vectors: (n, d).
        device: where products are computed. A GPU holds all rows where they take less than half of its free memory.
    """

    def __init__(self, vectors: Vectors, device: torch.device | str = "cpu"):
        self.vectors = vectors
        self.device = torch.device(device)
        n, dim = vectors.shape
        self._resident = None
        if self.device.type == "cuda" and 4 * n * dim < torch.cuda.mem_get_info(self.device)[0] / 2:
            self._resident = list(self._blocks())

    def _blocks(self):
        for start, block in self.vectors.blocks(BLOCK):
            yield start, torch.from_numpy(block).to(self.device)

    @full_float32()
    def __call__(self, rows: np.ndarray, k: int, max_similarity: float = float("inf")) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest others of some rows.

        Args:
            rows: (b,) ascending row numbers.
            k: Number of neighbours per row.
            max_similarity: Rows as similar as this or more are left out.

        Returns:
            (b, k) row numbers, int64, and their similarities, float32, the most similar first; -1 and -inf where fewer
            than k are left. A row never holds its own number, also where others equal it.
        """
        queries = torch.from_numpy(self.vectors.take(rows)).to(self.device)
        own_rows = torch.from_numpy(rows).to(self.device)
        blocks = self._resident or self._blocks()
        best, found = blocked_topk(queries, blocks, k, own_rows=own_rows, max_similarity=max_similarity, pad=True)
        return found.cpu().numpy(), best.cpu().numpy()


def search_all(
    searcher,
    k: int,
    max_similarity: float = float("inf"),
    work: Path | None = None,
    processes: Processes | None = None,
) -> np.ndarray:
    """The neighbours of all rows, each process its share.

    Args:
        searcher: An `ExactSearch` or the like.
        k: Number of neighbours per row.
        max_similarity: Rows as similar as this or more are left out.
        work: Folder, seen by all processes, where they put their parts.
        processes: Processes of the run; all of them must call.

    Returns:
        (n, k) int32 on process 0; the others get their part.
    """
    processes = processes or Processes(alone=True)
    n = searcher.vectors.shape[0]

    def chunks(rank: int) -> list[np.ndarray]:
        starts = range(rank * CHUNK, n, CHUNK * processes.count)
        return [np.arange(start, min(start + CHUNK, n)) for start in starts]

    with processes.together():
        neighbors = _search_chunks(searcher, chunks(processes.rank), k, max_similarity, show=processes.rank == 0)
        if processes.rank != 0:
            save_array(work / f"part-{processes.rank}.npy", neighbors)
    with processes.together():
        if processes.rank == 0 and processes.count > 1:
            parts = [neighbors, *(np.load(work / f"part-{rank}.npy") for rank in range(1, processes.count))]
            neighbors = np.empty((n, k), np.int32)
            for rank, part in enumerate(parts):
                if len(part):
                    neighbors[np.concatenate(chunks(rank))] = part
    return neighbors


def _search_chunks(searcher, chunks: list[np.ndarray], k: int, max_similarity: float, show: bool) -> np.ndarray:
    """The neighbours of some chunks of rows, one below the other, with a progress bar or without."""
    total = sum(map(len, chunks))
    neighbors = np.empty((total, k), np.int32)
    done = 0
    with progress_bar(total, "Searching neighbours", show) as progress:
        for rows in chunks:
            neighbors[done : done + len(rows)] = searcher(rows, k, max_similarity)[0]
            done += len(rows)
            progress.update(len(rows))
    return neighbors
