"""Agreement of a student with its teacher, without labels."""

import torch
from torch import Tensor

from coss_hf.evaluation.knn import check_pair, nearest, unit


def _check_rows(student: Tensor, teacher: Tensor) -> None:
    if len(student) != len(teacher):
        raise ValueError(
            f"student has {len(student)} rows and teacher {len(teacher)}: both must embed the same images in one order."
        )


def neighbor_overlap(student: Tensor, teacher: Tensor, k: int = 10, chunk: int = 1024) -> float:
    """Share of every image's k nearest others that student and teacher have in common, averaged over the images.

    Args:
        student: ``(n, d_s)`` embeddings.
        teacher: ``(n, d_t)`` embeddings of the same images; the dimensions may differ.
        k: neighbours by cosine, the image itself left out by index.
        chunk: rows compared at once.

    Returns:
        A number in [0, 1]: 1 for the same neighbours, ``k / (n - 1)`` on average by chance.

    Raises:
        ValueError: different numbers of rows; ``n <= k``.
    """
    _check_rows(student, teacher)
    if not 1 <= k < len(student):
        raise ValueError(f"k={k} must be between 1 and {len(student) - 1}, one less than the number of images.")
    _, ours = nearest(student, student, k, exclude_self=True, chunk=chunk)
    _, theirs = nearest(teacher, teacher, k, exclude_self=True, chunk=chunk)
    shared = sum(
        int((a[:, :, None] == b[:, None, :]).sum()) for a, b in zip(ours.split(chunk), theirs.split(chunk), strict=True)
    )
    return shared / ours.numel()


@torch.no_grad()
def mean_cosine(student: Tensor, teacher: Tensor) -> float:
    """Cosine between the student's and the teacher's embedding of an image, averaged over the images.

    Args:
        student: ``(n, d)`` embeddings; through its head where the backbone's dimension differs from the teacher's.
        teacher: ``(n, d)`` embeddings of the same images.

    Returns:
        A number in [-1, 1]; an all-zero embedding counts as 0.

    Raises:
        ValueError: different numbers of rows or dimensions, or no rows.
    """
    _check_rows(student, teacher)
    check_pair(student, teacher, "student and teacher")
    if len(student) == 0:
        raise ValueError("student and teacher hold no embeddings: the mean over no images is undefined.")
    return (unit(student) * unit(teacher)).sum(1).mean().item()
