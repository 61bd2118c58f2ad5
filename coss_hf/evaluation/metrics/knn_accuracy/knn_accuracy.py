"""Accuracy of the weighted k-nearest-neighbour classifier.

Loaded with ``evaluate.load("path/to/coss_hf/evaluation/metrics/knn_accuracy")``
"""

from coss_hf.evaluation.hf_metrics import KNNAccuracy

__all__ = ["KNNAccuracy"]
