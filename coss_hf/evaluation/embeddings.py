"""Evaluation of embeddings: weighted k-NN and a linear probe where there are labels, agreement with the teacher."""

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
from coss_hf.evaluation.knn import knn_accuracy
from coss_hf.evaluation.linear_evaluation import linear_evaluation
from coss_hf.evaluation.linear_probe import linear_probe
from coss_hf.evaluation.retrieval import retrieval

KS = (10, 20)
OVERLAP_K = 10
RECALLS = (1, 10)


def evaluate_embeddings(
    student: Tensor,
    teacher: Tensor,
    *,
    student_bank: Tensor | None = None,
    bank_labels: Tensor | None = None,
    test_labels: Tensor | None = None,
    projected: Tensor | None = None,
    teacher_bank: Tensor | None = None,
    linear: bool = False,
    panel: bool = False,
) -> dict[str, float | None]:
    """All metrics of one network.

    Args:
        student: ``(m, d_s)`` embeddings of the test images.
        teacher: ``(m, d_t)`` the teacher's embeddings of the same images.
        student_bank: ``(n, d_s)`` the student's embeddings of the un-augmented training images.
        bank_labels: ``(n,)`` class numbers of the bank.
        test_labels: ``(m,)`` class numbers of the test images.
        projected: ``(m, d_t)`` the student's embeddings through its head, in the teacher's space.
        teacher_bank: ``(n, d_t)`` the teacher's embeddings of the bank, for retrieval.
        linear: with labels also ``eval_linear``, the paper's linear evaluation.
        panel: also what tells whether training works, see below.

    Returns:
        ``eval_overlap10`` and ``eval_cosine``, and where the bank and both labels are given ``eval_knn10``,
        ``eval_knn20`` and ``eval_probe``. Fractions in [0, 1], the cosine in [-1, 1]. None for what is not defined:
        the cosine of different dimensions, neighbours where there are not enough images. With ``panel`` also
        ``eval_dimension_cosine``, ``eval_cka``, ``eval_effective_rank``, ``eval_dead_dimensions`` and
        ``eval_duplicates``, of the student without its head but for the cosine. With ``teacher_bank`` also
        ``eval_recall1``, ``eval_recall10`` and ``eval_map``, of retrieval from the student's own bank, and the same of
        retrieval from the teacher's, by projected queries, with ``asymmetric_`` in their names.

    Raises:
        ValueError: rows, dimensions or labels that do not match.
    """
    results: dict[str, float | None] = {}
    if student_bank is not None and bank_labels is not None and test_labels is not None:
        ks = tuple(k for k in KS if k <= len(student_bank))
        scores = knn_accuracy(student_bank, bank_labels, student, test_labels, ks) if ks else {}
        results |= {f"eval_knn{k}": scores.get(f"knn{k}") for k in KS}
        results["eval_probe"] = linear_probe(student_bank, bank_labels, student, test_labels)["accuracy"]
        if linear:
            results["eval_linear"] = linear_evaluation(student_bank, bank_labels, student, test_labels)
        if teacher_bank is not None:
            results |= _retrieval(student, student_bank, "", bank_labels, test_labels)
            queries = student if projected is None else projected
            results |= _retrieval(queries, teacher_bank, "asymmetric_", bank_labels, test_labels)
    enough = len(student) > OVERLAP_K
    results[f"eval_overlap{OVERLAP_K}"] = neighbor_overlap(student, teacher, OVERLAP_K) if enough else None
    aligned = student if projected is None else projected
    comparable = aligned.shape[1] == teacher.shape[1]
    results["eval_cosine"] = mean_cosine(aligned, teacher) if comparable else None
    if panel:
        results["eval_dimension_cosine"] = dimension_cosine(aligned, teacher) if comparable else None
        results["eval_cka"] = linear_cka(student, teacher)
        results["eval_effective_rank"] = effective_rank(student)
        results["eval_dead_dimensions"] = dead_share(student)
        results["eval_duplicates"] = duplicate_share(student)
    return results


def _retrieval(queries: Tensor, gallery: Tensor, kind: str, gallery_labels: Tensor, labels: Tensor) -> dict:
    if queries.shape[1] != gallery.shape[1]:  # random weights without a head
        return {}
    ks = tuple(k for k in RECALLS if k <= len(gallery))
    found = retrieval(queries, labels, gallery, gallery_labels, ks)
    return {f"eval_{kind}{name}": value for name, value in found.items()}
