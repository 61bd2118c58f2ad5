"""Accuracy of a linear classifier on frozen embeddings.

Loaded with ``evaluate.load("path/to/coss_hf/evaluation/metrics/linear_probe")``
"""

from coss_hf.evaluation.hf_metrics import LinearProbe

__all__ = ["LinearProbe"]
