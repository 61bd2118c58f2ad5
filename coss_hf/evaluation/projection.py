"""Two spaces in the plane, side by side."""

import torch
from torch import Tensor

from coss_hf.evaluation.knn import unit


def plane(embeddings: Tensor) -> Tensor:
    """First two principal components ``(n, 2)`` of the directions of ``(n, d)`` embeddings, at unit mean square."""
    x = unit(embeddings).double()
    x = x - x.mean(0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    flat = x @ vectors[:, -2:].flip(1)
    flat = torch.nn.functional.pad(flat, (0, 2 - flat.shape[1]))
    return flat / flat.square().sum(1).mean().sqrt().clamp_min(1e-30)


@torch.no_grad()
def planes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both networks' embeddings of the same images in the plane, the student's turned to match the teacher's.

    Args:
        student: ``(n, d_s)`` embeddings.
        teacher: ``(n, d_t)``.

    Returns:
        ``(n, 2)`` each, by principal components; the student's after the rotation or reflection with the least squared
        difference to the teacher's (orthogonal Procrustes).

    References:
        Schönemann, A generalized solution of the orthogonal Procrustes problem, Psychometrika 1966.
    """
    ours = plane(student)
    theirs = plane(teacher)
    u, _, v = torch.linalg.svd(ours.T @ theirs)
    return ours @ u @ v, theirs
