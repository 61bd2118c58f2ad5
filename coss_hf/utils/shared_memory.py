"""Shared memory, through which loader workers hand over their batches."""

import shutil
from pathlib import Path

from coss_hf.utils.cores import processes_on_machine

SHARED_MEMORY = Path("/dev/shm")
PREFETCH = 2  # batches that each worker loads ahead, as PyTorch's default


def check_shared_memory(workers: int, batches: dict[str, int], prefetch: int | None = None) -> None:
    """Check that there is room for all batches that loader workers may load ahead, on this machine.

    Without it a worker dies, or its run waits for ever.

    Args:
        workers: number of loader workers of a process.
        batches: bytes of a batch of each loader that may run at the same time, by what it is for.
        prefetch: number of batches that each worker loads ahead; None for PyTorch's default.

    Raises:
        ValueError: less memory is free than that.
    """
    free = room()
    if not workers or free is None or needed(workers, batches, prefetch) <= free:
        return
    processes = processes_on_machine()
    shown = ", ".join(f"{purpose} {_megabytes(size)}" for purpose, size in batches.items())
    raise ValueError(
        f"--dataloader_num_workers={workers}: loader workers hand over their batches in shared memory, of which "
        f"{SHARED_MEMORY} has {_megabytes(processes * free)} free; they may take "
        f"{_megabytes(processes * needed(workers, batches, prefetch))} ({processes} processes "
        f"x {_ahead(workers, prefetch)} batches; a batch of {shown}). Give it more "
        f"(docker run --shm-size=..., or --ipc=host), or use fewer workers, smaller batches, or "
        f"--dataloader_num_workers 0."
    )


def room() -> int | None:
    """Return the bytes of shared memory that are free for each process of this machine; None where it has none."""
    return shutil.disk_usage(SHARED_MEMORY).free // processes_on_machine() if SHARED_MEMORY.is_dir() else None


def needed(workers: int, batches: dict[str, int], prefetch: int | None = None) -> int:
    """Return the bytes that the loader workers of one process may take.

    Args:
        workers: number of loader workers of a process.
        batches: bytes of a batch of each loader that may run at the same time, by what it is for.
        prefetch: number of batches that each worker loads ahead; None for PyTorch's default.
    """
    return _ahead(workers, prefetch) * sum(batches.values())


def _ahead(workers: int, prefetch: int | None) -> int:
    return workers * (prefetch or PREFETCH) + 1  # and the one in use


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
