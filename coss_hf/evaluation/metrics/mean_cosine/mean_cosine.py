"""Mean cosine between the student's and the teacher's embeddings.

Loaded with ``evaluate.load("path/to/coss_hf/evaluation/metrics/mean_cosine")``
"""

from coss_hf.evaluation.hf_metrics import MeanCosine

__all__ = ["MeanCosine"]
