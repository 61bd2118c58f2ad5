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


@torch.no_grad()
def dimension_cosine(student: Tensor, teacher: Tensor) -> float:
    """Cosine between the student's and the teacher's values of a dimension over the images, averaged over dimensions.

    Arguments, result and errors as :func:`mean_cosine`; a dimension that is zero in either counts as 0.
    """
    _check_rows(student, teacher)
    check_pair(student, teacher, "student and teacher")
    return mean_cosine(student.T, teacher.T)


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


@torch.no_grad()
def linear_cka(student: Tensor, teacher: Tensor) -> float:
    """Linear centred kernel alignment ``||S^T T||_F^2 / (||S^T S||_F ||T^T T||_F)`` of the centred embeddings.

    Args:
        student: ``(n, d_s)`` embeddings.
        teacher: ``(n, d_t)`` embeddings of the same images; the dimensions may differ.

    Returns:
        A number in [0, 1], 1 for equal embeddings up to rotation and scale; 0 where either is constant.

    Raises:
        ValueError: different numbers of rows, or fewer than two.

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019 (arXiv:1905.00414).
    """
    _check_rows(student, teacher)
    if len(student) < 2:
        raise ValueError(f"a kernel alignment needs two images at least, got {len(student)}.")
    s = _centred(student)
    t = _centred(teacher)
    scale = (s.T @ s).norm() * (t.T @ t).norm()
    return ((s.T @ t).square().sum() / scale).item() if scale > 0 else 0.0


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """Exponential of the entropy of the normalised singular values of the centred embeddings ``(n, d)``.

    Returns:
        Between 1 (all on a line) and ``min(n - 1, d)`` (all directions alike); 0 for embeddings that are all equal,
        and for none.

    References:
        Roy & Vetterli, The effective rank, EUSIPCO 2007; as RankMe (Garrido et al., arXiv:2210.02885), centred.
    """
    if not embeddings.numel():
        return 0.0
    values = torch.linalg.svdvals(_centred(embeddings))
    # What centring leaves of equal rows is rounding noise.
    if values[0] <= 1e-6 * embeddings.double().norm():
        return 0.0
    share = values / values.sum()
    return torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def dead_share(embeddings: Tensor) -> float:
    """Share of dimensions of ``(n, d)`` embeddings that are the same for every image; 0 for no images."""
    if not embeddings.numel():
        return 0.0
    x = embeddings.double()
    return (x.std(0, correction=0) <= 1e-6 * x.abs().amax().clamp_min(1e-30)).double().mean().item()


@torch.no_grad()
def duplicate_share(embeddings: Tensor, cosine: float = 1 - 1e-6) -> float:
    """Share of ``(n, d)`` embeddings that have another one in the same direction, up to rounding.

    All-zero embeddings have no direction, and are duplicates of each other.
    """
    if len(embeddings) < 2:
        return 0.0
    found, _ = nearest(embeddings.double(), embeddings.double(), 1, exclude_self=True)
    zero = (embeddings == 0).all(1)
    duplicates = (found[:, 0] >= cosine) | (zero & (zero.sum() > 1))
    return duplicates.double().mean().item()
