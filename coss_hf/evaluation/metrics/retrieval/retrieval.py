"""Recall at k and mean average precision of image retrieval.

Loaded with ``evaluate.load("path/to/coss_hf/evaluation/metrics/retrieval")``
"""

from coss_hf.evaluation.hf_metrics import Retrieval

__all__ = ["Retrieval"]
