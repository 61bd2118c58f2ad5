"""Shared memory, through which loader workers hand over their batches."""

import os
import shutil
from pathlib import Path

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
    if not workers or not SHARED_MEMORY.is_dir():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    ahead = workers * (prefetch or PREFETCH) + 1  # and the one in use
    needed = processes * ahead * sum(batches.values())
    free = shutil.disk_usage(SHARED_MEMORY).free
    if needed <= free:
        return
    shown = ", ".join(f"{purpose} {_megabytes(size)}" for purpose, size in batches.items())
    raise ValueError(
        f"--dataloader_num_workers={workers}: loader workers hand over their batches in shared memory, of which "
        f"{SHARED_MEMORY} has {_megabytes(free)} free; they may take {_megabytes(needed)} ({processes} processes x "
        f"{ahead} batches; a batch of {shown}). Give it more (docker run --shm-size=..., or --ipc=host), or use fewer "
        f"workers, smaller batches, or --dataloader_num_workers 0."
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
