"""Embeddings on disk, in shards that several processes write and all map into memory; and neighbours once found."""

import contextlib
import logging
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import embed_batches
from coss_hf.neighbors.columns import some
from coss_hf.utils.process_group import Processes

logger = logging.getLogger(__name__)

SHARD, STEP = 8192, 256  # rows of a shard, what a killed process loses at most; and what they are a multiple of


def shard_rows(n: int) -> int:
    """Rows of a shard: fewer for few images, so that processes share evenly; more for so many that files would be."""
    rows = max(min(SHARD, -(-n // 64)), -(-n // 4096))
    return -(-rows // STEP) * STEP


class Vectors:
    """(n, d) unit rows, kept in one array or in equal shards, in memory or mapped into it.

    Attributes:
        shape: (n, d).
        dtype: float32 or float16. What is read is float32.
    """

    def __init__(self, shards: list[np.ndarray]):
        self.shards, self.rows = shards, len(shards[0])
        self.shape, self.dtype = (sum(map(len, shards)), shards[0].shape[1]), shards[0].dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1, float32; the very memory where that can be."""
        parts = [
            self.shards[i][max(start - i * self.rows, 0) : stop - i * self.rows]
            for i in range(start // self.rows, (stop - 1) // self.rows + 1)
        ]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(np.float32, copy=False)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Any rows, (m,) ascending -> (m, d) float32."""
        taken = np.empty((len(rows), self.shape[1]), np.float32)
        bounds = np.searchsorted(rows, np.arange(len(self.shards) + 1) * self.rows)
        for i in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[i], bounds[i + 1])
            taken[part] = self.shards[i][rows[part] - i * self.rows]
        return taken

    def release(self) -> None:
        """Gives mapped pages back to the system's cache: what was read once need not count as memory of the process."""
        for shard in self.shards:
            if isinstance(shard.base, mmap.mmap):
                shard.base.madvise(mmap.MADV_DONTNEED)

    def blocks(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """All rows in order: (first row, up to `size` rows float32)."""
        for start in range(0, self.shape[0], size):
            yield start, self.read(start, min(start + size, self.shape[0]))


def unit_rows(embeddings: torch.Tensor) -> torch.Tensor:
    """(b, d) -> float32 rows of length 1 (zeros stay); float64 inside, so that no square overflows or vanishes."""
    rows = embeddings.to("cpu", torch.float64)
    norms = rows.norm(dim=1, keepdim=True)
    return (rows / torch.where(norms > 0, norms, 1.0)).float()


def check_finite(embeddings: torch.Tensor, first: int = 0) -> torch.Tensor:
    """(b, d) -> the same. Raises ValueError with the numbers, from `first`, of rows that hold NaN or infinity."""
    finite = torch.cat([chunk.isfinite().all(dim=1) for chunk in embeddings.split(1024)])
    bad = [first + row for row in (~finite).nonzero().flatten().tolist()]
    if bad:
        raise ValueError(
            f"embeddings: {len(bad)} of {len(embeddings)} rows hold NaN or infinity (rows {some(bad)}); "
            "embed with --teacher_dtype float32, and look at these images if that does not help."
        )
    return embeddings


def embed_shards(
    backbone: Backbone,
    images,
    folder: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 256,
    num_workers: int = 0,
    processes: Processes | None = None,
) -> Vectors:
    """Unit embeddings of all images in files `00000.npy`, ... of a folder, each there whole or not at all.

    Shards that the folder already holds are kept, the rest is spread over the processes. Batches end where shards do,
    so the result depends neither on the number of processes nor on where an earlier run was stopped.

    Args:
        backbone: the network, on any device.
        images: n items (3, h, w), as `ProcessedImages`.
        folder: seen by all processes; for these images, backbone and dtype alone.
        dtype: "float32" or "float16", of the files.
        batch_size, num_workers: of the forward passes.
        processes: those of the run; all call.

    Returns:
        (n, d), mapped into memory.

    Raises:
        ValueError: on all processes, whichever finds embeddings that are not finite, or a folder that cannot be written
            or is not seen by all. Finished shards stay.
    """
    processes = processes or Processes()
    n, rows = len(images), shard_rows(len(images))
    firsts = range(0, n, rows)
    paths = [folder / f"{number:05d}.npy" for number in range(len(firsts))]
    shapes = [(min(rows, n - first), backbone.dim) for first in firsts]

    def opened(number: int) -> np.ndarray | None:
        try:  # "c": torch wants writable memory; nothing is written
            shard = np.load(paths[number], mmap_mode="c")
        except (OSError, ValueError, EOFError):
            return None
        return shard if shard.shape == shapes[number] and shard.dtype == dtype else None

    with processes.together():
        folder.mkdir(parents=True, exist_ok=True)
    # One process looks, since the others may already be writing.
    missing = processes.gather([i for i in range(len(paths)) if opened(i) is None] if processes.rank == 0 else None)[0]
    damaged = [paths[i].name for i in missing if paths[i].exists()] if processes.rank == 0 else []
    if damaged:
        logger.warning("Embedding: %s in %s are damaged: embedded again.", some(damaged), folder)
    if processes.rank == 0 and len(missing) < len(paths):
        logger.info("Embedding: %d of %d shards found in %s", len(paths) - len(missing), len(paths), folder)
    with processes.together():
        mine = missing[processes.rank :: processes.count]
        batches = [
            range(start, min(start + batch_size, firsts[i] + shapes[i][0]))
            for i in mine
            for start in range(firsts[i], firsts[i] + shapes[i][0], batch_size)
        ]
        device = next(backbone.model.parameters()).device
        options = {"num_workers": num_workers, "pin_memory": device.type == "cuda"}
        embedded = embed_batches(backbone, DataLoader(images, batch_sampler=batches, **options))
        hidden = {"disable": True} if processes.rank else {}  # else as TQDM_DISABLE says
        progress = tqdm(
            total=sum(shapes[i][0] for i in mine),
            desc="Embedding for neighbours",
            unit="img",
            leave=False,
            **hidden,
        )
        with progress, contextlib.closing(embedded):
            for i in mine:
                shard, filled = np.empty(shapes[i], dtype), 0
                while filled < len(shard):
                    embedding = check_finite(next(embedded), firsts[i] + filled)
                    shard[filled : filled + len(embedding)] = unit_rows(embedding).numpy()
                    filled += len(embedding)
                    progress.update(len(embedding))
                save_array(paths[i], shard)
    with processes.together():
        shards = [opened(i) for i in range(len(paths))]
        lost = [path.name for path, shard in zip(paths, shards, strict=True) if shard is None]
        if lost:
            raise ValueError(
                f"--neighbors_cache {folder.parent}: process {processes.rank} does not see the shards {some(lost)} of "
                f"other processes; give a folder that all machines share."
            )
    return Vectors(shards)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name, `path`, once it is whole and on the disk.

    Raises:
        ValueError: it cannot be written (the disk is full); nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a machine that dies must not leave a renamed but empty file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # faiss raises the latter
        temporary.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file; see `whole_file`."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def unwritable(path: Path, error: Exception) -> ValueError:
    """What to say of a file in the neighbours' cache that could not be written."""
    return ValueError(
        f"--neighbors_cache {path.parent.parent}: {path} cannot be written ({error}); make room, or give another "
        f"folder. The same command then goes on from the shards that are finished."
    )
