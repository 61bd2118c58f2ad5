"""How much memory a piece of work takes."""

import threading
from collections.abc import Callable

import psutil

INTERVAL = 0.002  # seconds between two looks


def peak_resident_bytes(work: Callable[[], object]) -> int:
    """Run ``work`` and return the most memory that this process had in use meanwhile, in bytes."""
    done = threading.Event()
    process = psutil.Process()
    peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(INTERVAL):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss)
