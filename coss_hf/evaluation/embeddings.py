"""All metrics of embeddings: weighted k-NN and a linear probe where there are labels, agreement with the teacher."""

import tempfile

from torch import Tensor

from coss_hf.evaluation.agreement import (
    dead_share,
    dimension_cosine,
    duplicate_share,
    effective_rank,
    linear_cka,
    mean_cosine,
    neighbor_overlap,
)
from coss_hf.evaluation.linear_evaluation import linear_evaluation

KS = (10, 20)
OVERLAP_K = 10
RECALLS = (1, 10)
MIN_CKA = 2  # images
MIN_PROBE = 2  # training images: one to fit, one to choose the learning rate on


def evaluate_embeddings(
    student: Tensor,
    teacher: Tensor,
    *,
    train_features: Tensor | None = None,
    train_labels: Tensor | None = None,
    test_labels: Tensor | None = None,
    projected: Tensor | None = None,
    teacher_gallery: Tensor | None = None,
    linear: bool = False,
    diagnostics: bool = False,
) -> dict[str, float | None]:
    """Compute all metrics of one network.

    Accuracies and retrieval are computed by the metrics of :mod:`coss_hf.evaluation.hf_metrics`, which is imported
    only where the labels are given: the ``evaluate`` library takes seconds to import.

    Args:
        student: ``(m, d_s)`` the student's embeddings of the test images.
        teacher: ``(m, d_t)`` the teacher's embeddings of the test images.
        train_features: ``(n, d_s)`` the student's embeddings of the un-augmented train images.
        train_labels: ``(n,)`` class numbers of the train images.
        test_labels: ``(m,)`` class numbers of the test images.
        projected: ``(m, d_t)`` the student's embeddings of the test images through its head, in the teacher's space.
        teacher_gallery: ``(n, d_t)`` the teacher's embeddings of the train images, for retrieval.
        linear: With labels also compute ``linear``, the paper's linear evaluation.
        diagnostics: Also compute what tells whether training works, see below.

    Returns:
        ``overlap10`` and ``cosine``, and where the train features and both labels are given ``knn10``, ``knn20`` and
        ``probe``. Fractions in [0, 1], the cosine in [-1, 1]. None for what is not defined: the cosine of different
        dimensions, neighbours, the probe and ``cka`` where there are not enough images. With ``diagnostics`` also
        ``dimension_cosine``, ``cka``, ``effective_rank``, ``dead_dimensions`` and ``duplicates``, of the student
        without its head but for the cosine. With ``teacher_gallery`` also ``recall1``, ``recall10`` and ``map``, of
        retrieval with the test images as queries from the student's own train features, and the same of retrieval from
        the teacher's gallery, by projected queries, with ``asymmetric_`` in their names.

    Raises:
        ValueError: rows, dimensions or labels that do not match.
    """
    results: dict[str, float | None] = {}
    aligned = student if projected is None else projected
    if train_features is not None and train_labels is not None and test_labels is not None:
        results |= _classification(train_features, train_labels, student, test_labels)
        if linear:
            both = len(train_features) > 0 and len(student) > 0
            results["linear"] = linear_evaluation(train_features, train_labels, student, test_labels) if both else None
        if teacher_gallery is not None:
            own = _retrieval(student, test_labels, train_features, train_labels)
            asymmetric = _retrieval(aligned, test_labels, teacher_gallery, train_labels)
            results |= own
            results |= {f"asymmetric_{name}": value for name, value in asymmetric.items()}
    enough = len(student) > OVERLAP_K
    results[f"overlap{OVERLAP_K}"] = neighbor_overlap(student, teacher, OVERLAP_K) if enough else None
    comparable = aligned.shape[1] == teacher.shape[1] and len(student) > 0
    results["cosine"] = mean_cosine(aligned, teacher) if comparable else None
    if diagnostics:
        results["dimension_cosine"] = dimension_cosine(aligned, teacher) if comparable else None
        results["cka"] = linear_cka(student, teacher) if len(student) >= MIN_CKA else None
        results["effective_rank"] = effective_rank(student)
        results["dead_dimensions"] = dead_share(student)
        results["duplicates"] = duplicate_share(student)
    return results


def _compute(metric: str, **inputs) -> dict[str, float]:
    """Results of a class of ``hf_metrics``, which takes tensors as they are."""
    from coss_hf.evaluation import hf_metrics

    # A metric makes a folder when it is constructed, though nothing is written here: not in the user's cache.
    with tempfile.TemporaryDirectory() as folder:
        return getattr(hf_metrics, metric)(cache_dir=folder).compute(**inputs)


def _classification(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor
) -> dict[str, float | None]:
    inputs = {
        "predictions": test_features,
        "references": test_labels,
        "train_features": train_features,
        "train_labels": train_labels,
    }
    ks = tuple(k for k in KS if k <= len(train_features) and len(test_features) > 0)
    scores = _compute("KNNAccuracy", k=ks, **inputs) if ks else {}
    results = {f"knn{k}": scores.get(f"knn{k}") for k in KS}
    enough = len(train_features) >= MIN_PROBE and len(test_features) > 0
    return results | (_compute("LinearProbe", **inputs) if enough else {"probe": None})


def _retrieval(
    queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor
) -> dict[str, float | None]:
    if queries.shape[1] != gallery.shape[1]:  # random weights without a head
        return {}
    if not (len(queries) and len(gallery)):
        return {}
    return _compute(
        "Retrieval",
        predictions=queries,
        references=query_labels,
        gallery=gallery,
        gallery_labels=gallery_labels,
        k=tuple(k for k in RECALLS if k <= len(gallery)),
    )
