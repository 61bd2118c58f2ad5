"""Recall of an approximate search, measured against the exact neighbours of a random sample of queries."""

import numpy as np

from coss_hf.utils.messages import get_logger
from coss_hf.utils.process_group import Processes

logger = get_logger(__name__)

SAMPLE = 1024  # queries whose exact neighbours measure the recall
SAMPLE_UNIT = 256  # queries of the sample that a process takes at a time


def random_rows(n: int, count: int) -> np.ndarray:
    """About `count` of n row numbers, ascending, always the same; no permutation of all is held."""
    return np.arange(n) if count >= n else np.unique(np.random.default_rng(0).integers(n, size=count))


def raise_probes(index, k: int, max_similarity: float, target: float, processes: Processes) -> tuple[float, int]:
    """Double an index's probes until it finds the target share of the exact neighbours of a random sample of queries.

    What is as similar as the k-th exact neighbour counts as found: among duplicates numbers say nothing.

    Args:
        index: A search as `ExactSearch`, with `exact`, `probes`, `max_probes`.
        k: Number of neighbours per query.
        max_similarity: Rows as similar as this or more are left out.
        target: Recall to reach, in (0, 1].
        processes: Processes of the run; all of them must call, and each measures a share of the sample.

    Returns:
        The recall reached, below the target where all probes do not suffice; and the number of queries.
    """
    sample = random_rows(index.vectors.shape[0], SAMPLE)
    starts = range(processes.rank * SAMPLE_UNIT, len(sample), processes.count * SAMPLE_UNIT)
    mine = [sample[start : start + SAMPLE_UNIT] for start in starts]
    exact = [index.exact(rows, k, max_similarity)[1] for rows in mine]
    while True:
        found = 0
        wanted = 0
        for rows, best in zip(mine, exact, strict=True):
            there = best > -np.inf
            last = np.where(there, best, np.inf).min(axis=1, keepdims=True)
            reached = (index(rows, k, max_similarity)[1] >= last - 1e-6).sum(axis=1)
            found += np.minimum(reached, there.sum(axis=1)).sum()
            wanted += there.sum()
        found, wanted = np.sum(processes.gather((found, wanted)), axis=0)
        recall = found / wanted if wanted else 1.0  # where max_similarity leaves the sample none, none is missed
        if recall >= target or index.probes >= index.max_probes:
            return float(recall), len(sample)
        before = index.probes
        index.probes = min(2 * index.probes, index.max_probes)
        if processes.rank == 0:
            logger.info(
                "Neighbours: recall %.4f with %d probes is below --neighbors_recall %g: raised to %d",
                recall,
                before,
                target,
                index.probes,
            )
