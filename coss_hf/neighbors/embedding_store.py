"""Embeddings on disk, in shards that several processes write and all map into memory."""

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from coss_hf.models.backbone import Backbone
from coss_hf.models.embedding import check_finite, embed_batches
from coss_hf.neighbors.columns import some
from coss_hf.utils.messages import get_logger
from coss_hf.utils.process_group import Processes

logger = get_logger(__name__)

SHARD = 8192  # rows of a shard: what a killed process loses at most
STEP = 256  # the rows of a shard are a multiple of this


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
        self.shards = shards
        self.rows = len(shards[0])
        self.shape = (sum(map(len, shards)), shards[0].shape[1])
        self.dtype = shards[0].dtype

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
    """Unit embeddings of all images in files `00000.npy`, ... of a folder, each there complete or not at all.

    Shards that the folder already holds are kept, the rest is spread over the processes. Batches end where shards do,
    so the result depends neither on the number of processes nor on where an earlier run was stopped.

    Args:
        backbone: the network, on any device.
        images: n items (3, h, w), as `ProcessedImages`.
        folder: seen by all processes; for these images, backbone and dtype alone.
        dtype: "float32" or "float16", of the files.
        batch_size: Images per forward pass.
        num_workers: Number of processes that decode images.
        processes: Processes of the run; all of them must call.

    Returns:
        (n, d), mapped into memory.

    Raises:
        ValueError: on all processes, whichever finds embeddings that are not finite, or a folder that cannot be written
            or is not seen by all. Finished shards stay.
    """
    processes = processes or Processes()
    n = len(images)
    rows = shard_rows(n)
    shards = [
        Shard(folder / f"{number:05d}.npy", first, (min(rows, n - first), backbone.dim), dtype)
        for number, first in enumerate(range(0, n, rows))
    ]
    with processes.together():
        folder.mkdir(parents=True, exist_ok=True)
    processes.check_shared(folder, f"--neighbors_cache {folder.parent}")  # before hours are spent
    # One process looks, since the others may already be writing.
    missing = processes.gather(_missing(shards, folder) if processes.rank == 0 else None)[0]
    with processes.together():
        mine = [shards[i] for i in missing[processes.rank :: processes.count]]
        _embed(backbone, images, mine, batch_size, num_workers, show=processes.rank == 0)
    with processes.together():
        arrays = [shard.open() for shard in shards]
        lost = [shard.path.name for shard, array in zip(shards, arrays, strict=True) if array is None]
        if lost:
            raise ValueError(
                f"--neighbors_cache {folder.parent}: process {processes.rank} does not see the shards {some(lost)} of "
                f"other processes; give a folder that all machines share."
            )
    return Vectors(arrays)


class Shard(NamedTuple):
    """A file of embeddings.

    Attributes:
        path: Of the file.
        first: Number of its first image.
        shape: (rows, d).
        dtype: "float32" or "float16".
    """

    path: Path
    first: int
    shape: tuple[int, int]
    dtype: str

    def open(self) -> np.ndarray | None:
        """The file, mapped into memory; None where it is not there or not what was written."""
        try:  # "c": torch wants writable memory; nothing is written
            array = np.load(self.path, mmap_mode="c")
        except (OSError, ValueError, EOFError):
            return None
        return array if array.shape == self.shape and array.dtype == self.dtype else None

    def batches(self, size: int) -> list[range]:
        """Numbers of its images, in batches of `size` at most."""
        end = self.first + self.shape[0]
        return [range(start, min(start + size, end)) for start in range(self.first, end, size)]


def _missing(shards: list[Shard], folder: Path) -> list[int]:
    """Numbers of the shards that are to be embedded; says what was found."""
    missing = [i for i, shard in enumerate(shards) if shard.open() is None]
    damaged = [shards[i].path.name for i in missing if shards[i].path.exists()]
    if damaged:
        logger.warning("Embedding: %s in %s are damaged: embedded again.", some(damaged), folder)
    if len(missing) < len(shards):
        logger.info("Embedding: %d of %d shards found in %s", len(shards) - len(missing), len(shards), folder)
    return missing


def _embed(backbone: Backbone, images, shards: list[Shard], batch_size: int, num_workers: int, show: bool) -> None:
    """Writes some shards, with a progress bar or without."""
    batches = [batch for shard in shards for batch in shard.batches(batch_size)]
    device = next(backbone.model.parameters()).device
    loader = DataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    embedded = embed_batches(backbone, loader)
    total = sum(shard.shape[0] for shard in shards)
    with progress_bar(total, "Embedding for neighbours", show) as progress, contextlib.closing(embedded):
        for shard in shards:
            array = np.empty(shard.shape, shard.dtype)
            filled = 0
            while filled < len(array):
                embedding = next(embedded)
                check_finite(embedding, images, shard.first + filled, "Embedding for neighbours")
                array[filled : filled + len(embedding)] = unit_rows(embedding).numpy()
                filled += len(embedding)
                progress.update(len(embedding))
            save_array(shard.path, array)


def progress_bar(total: int, description: str, show: bool) -> tqdm:
    """A progress bar over images; where it is to be shown, TQDM_DISABLE can still switch it off."""
    hidden = {} if show else {"disable": True}
    return tqdm(total=total, desc=description, unit="img", leave=False, **hidden)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Where to write a file that gets its name, `path`, once it is complete and on the disk.

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
    """Writes a .npy file; see `atomic_file`."""
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)


def unwritable(path: Path, error: Exception) -> ValueError:
    """What to say of a file in the neighbours' cache that could not be written."""
    return ValueError(
        f"--neighbors_cache {path.parent.parent}: {path} cannot be written ({error}); free some space, or give another "
        f"folder. The same command then resumes from the shards that are finished."
    )
