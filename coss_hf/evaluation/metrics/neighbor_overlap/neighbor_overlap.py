"""Share of nearest neighbours that student and teacher have in common.

Loaded with ``evaluate.load("path/to/coss_hf/evaluation/metrics/neighbor_overlap")``
"""

from coss_hf.evaluation.hf_metrics import NeighborOverlap

__all__ = ["NeighborOverlap"]
