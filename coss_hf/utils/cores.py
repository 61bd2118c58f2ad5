"""How many processor cores this process may use, and how busy other programs keep them."""

import contextlib
import math
import os
import time
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return max(1, min(cores, math.ceil(quota)) if quota else cores)


def processes_on_machine() -> int:
    """Return the number of processes of this training on this machine, as the launcher says."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _quota() -> float | None:
    """Cores that the container may use; None without a limit."""
    with contextlib.suppress(OSError, ValueError):
        limit, period = (CGROUP / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    with contextlib.suppress(OSError, ValueError):  # version 1
        limit = int((CGROUP / "cpu" / "cpu.cfs_quota_us").read_text())
        period = int((CGROUP / "cpu" / "cpu.cfs_period_us").read_text())
        return limit / period if limit > 0 else None
    return None


class OtherLoad:
    """Cores that other programs keep busy, among those that this process may use, since this object was made."""

    def __init__(self):
        self._process = psutil.Process()
        self._start = time.monotonic()
        self._before = self._busy_seconds()

    def cores(self, at_least: float = 1.0) -> float | None:
        """Return how many cores were busy with other programs on average.

        Args:
            at_least: seconds that must have passed.

        Returns:
            The number; None where less time has passed, or where the system does not tell: within a container's quota
            it counts the cores of all containers.
        """
        if _quota() is not None:
            return None
        elapsed = time.monotonic() - self._start
        after = self._busy_seconds()
        if elapsed < at_least or after is None or self._before is None:
            return None
        return max(0.0, (after - self._before) / elapsed)

    def _own_processes(self) -> list[psutil.Process]:
        """This process, the others of its training on this machine, and the loader workers of all of them."""
        first = self._process.parent() if processes_on_machine() > 1 else None
        first = first or self._process
        return [self._process, *(one for one in first.children(recursive=True) if one.pid != self._process.pid)]

    def _busy_seconds(self) -> float | None:
        try:
            allowed = os.sched_getaffinity(0)
            cores = psutil.cpu_times(percpu=True)
            busy = sum(
                sum(core)
                - core.idle
                - getattr(core, "iowait", 0)
                - getattr(core, "guest", 0)
                - getattr(core, "guest_nice", 0)
                for number, core in enumerate(cores)
                if number in allowed
            )
            return busy - sum(map(_seconds, self._own_processes()))
        except (AttributeError, OSError, psutil.Error):
            return None


def _seconds(process: psutil.Process) -> float:
    """Seconds that a process has computed, with its children that have ended; 0 where it is gone."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.Error:
        return 0.0
