"""How good embeddings are: k-NN and linear classification with labels, agreement with the teacher without."""

from coss_hf.evaluation.agreement import mean_cosine, neighbor_overlap
from coss_hf.evaluation.embeddings import evaluate_embeddings
from coss_hf.evaluation.knn import knn_accuracy, knn_predict, nearest
from coss_hf.evaluation.linear_evaluation import linear_evaluation
from coss_hf.evaluation.linear_probe import linear_probe
from coss_hf.evaluation.retrieval import retrieval
from coss_hf.evaluation.tables import COLUMNS, cells, table

__all__ = [
    "COLUMNS",
    "cells",
    "evaluate_embeddings",
    "knn_accuracy",
    "knn_predict",
    "linear_evaluation",
    "linear_probe",
    "mean_cosine",
    "nearest",
    "neighbor_overlap",
    "retrieval",
    "table",
]
