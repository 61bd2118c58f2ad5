"""CoSS: feature similarity plus space similarity."""

import torch
from torch import Tensor

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights
from coss_hf.utils.distributed import all_reduce_sum

EPS = 1e-12


def _cosine(dot: Tensor, student_squares: Tensor, teacher_squares: Tensor) -> Tensor:
    """Compute cosines from inner products and squared norms; the norms are clamped at 1e-12 from below.

    A student vector that is exactly zero has no direction: it gets no gradient, where the literal
    derivative of the clamp would be about 1e12.
    """
    zero = student_squares == 0
    # sqrt has an infinite slope at 0: keep it out of the graph.
    student_norm = torch.where(zero, 1.0, student_squares).sqrt().clamp_min(EPS)
    cosine = dot / (student_norm * teacher_squares.sqrt().clamp_min(EPS))
    return torch.where(zero, 0.0, cosine)


def cosine_totals(s: Tensor, t: Tensor) -> Tensor:
    """Compute the sums that the mean cosines of a batch ``(b, d)`` are made of, as one vector ``(2 + 3d,)``.

    They are the sum of the cosines of all rows, the number of rows, and for each column the sums of
    s·t, s² and t². The sums of several processes or micro-batches add up to those of all their
    images. Computed in float32 or wider, also under autocast.
    """
    with torch.autocast(s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
        s = s.to(dtype)
        t = t.to(dtype)
        product = s * t
        s_squares = s * s
        t_squares = t * t
        rows = _cosine(product.sum(1), s_squares.sum(1), t_squares.sum(1)).sum()
        count = rows.new_full((), s.shape[0])
        return torch.cat([torch.stack([rows, count]), product.sum(0), s_squares.sum(0), t_squares.sum(0)])


def mean_cosines(s: Tensor, t: Tensor, other_totals: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute the mean cosine per row and per column of ``s`` and ``t`` ``(b, d)``, over the batch of all processes.

    Args:
        s: Embeddings of the student.
        t: Embeddings of the teacher.
        other_totals: ``cosine_totals`` of the other micro-batches of the batch, over all processes.
    """
    totals = all_reduce_sum(cosine_totals(s, t))
    if other_totals is not None:
        totals = totals + other_totals
    with torch.autocast(s.device.type, enabled=False):
        rows, count = totals[:2]
        columns = totals[2:].view(3, -1)
        return rows / count, _cosine(*columns).mean()


class CoSSLoss(DistillationLoss):
    """Space-similarity distillation: match embeddings per image and, as columns of the batch, per feature dimension.

    ``loss = beta * (lambda_co * L_co + lambda_ss * L_ss)`` with
    ``L_co = -mean_i cos(S[i, :], T[i, :])`` over images and
    ``L_ss = -mean_j cos(S[:, j], T[:, j])`` over feature dimensions. ``L_ss`` is a statistic of the
    batch. Computed in float32 or wider.

    Shapes: embeddings ``(b, d)`` of both networks.

    Several processes: both terms are those of the batch of all processes, from three all-reduced
    vectors of length ``d``. Value and gradient equal those of one process, for uneven shards, too.

    Exact accumulation: ``other_totals`` holds the ``totals`` of the other micro-batches.

    Use when: you have no reason to prefer another method. It is the method of the paper that this
    package implements, it is fast, and the student's embeddings can be compared with the teacher's.
    Use large batches.

    Args:
        beta: Scale of the loss (50 in the authors' CIFAR code).
        lambda_ss: Weight of the space term.
        lambda_co: Weight of the feature term; 1 in the paper but for the ablation of its Table 2.

    Returns (when called): ``loss``; ``l_co`` and ``l_ss`` without ``beta``.

    Raises:
        ValueError: Embeddings that are not both ``(b, d)``; a weight that is negative or not
            finite.

    Example:
        >>> import torch
        >>> from coss_hf.losses import CoSSLoss
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> student = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # the same directions
        >>> CoSSLoss(beta=50.0)(student, teacher)
        {'loss': tensor(-100.), 'l_co': tensor(-1.), 'l_ss': tensor(-1.)}

    References:
        Singh and Wang, Simple Unsupervised Knowledge Distillation With Space Similarity, ECCV 2024
        (arXiv:2409.13939), Algorithm 1. Original code: github.com/paganpasta/coss-pytorch.
    """

    name = "coss"
    reads = "embedding"
    couples_images = True
    same_dim = True
    separable = True
    cosine_parts = ("l_co", "l_ss")
    citation = Citation(
        authors="Singh, A. and Wang, H.",
        title="Simple Unsupervised Knowledge Distillation With Space Similarity",
        venue="ECCV",
        year=2024,
        arxiv="2409.13939",
    )

    def __init__(self, beta: float = 50.0, lambda_ss: float = 1.0, lambda_co: float = 1.0):
        super().__init__()
        check_weights(beta=beta, lambda_ss=lambda_ss, lambda_co=lambda_co)
        self.beta = beta
        self.lambda_ss = lambda_ss
        self.lambda_co = lambda_co

    @property
    def optimum(self) -> float:
        """The smallest value of the loss: all cosines are 1."""
        return -self.beta * (self.lambda_co + self.lambda_ss)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, lambda_ss={self.lambda_ss}, lambda_co={self.lambda_co}"

    def totals(self, student: Features, teacher: Features) -> Tensor:
        """Compute the sums ``(2 + 3d,)`` of this batch, of which ``other_totals`` is made; see ``cosine_totals``."""
        return cosine_totals(*self._embeddings(student, teacher))

    def forward(
        self, student: Features, teacher: Features, index: Tensor | None = None, other_totals: Tensor | None = None
    ) -> dict[str, Tensor]:
        co, ss = mean_cosines(*self._embeddings(student, teacher), other_totals)
        return {"loss": -self.beta * (self.lambda_co * co + self.lambda_ss * ss), "l_co": -co, "l_ss": -ss}

    def _embeddings(self, student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        s = student.embedding
        t = teacher.embedding.detach()
        if s.dim() != 2 or s.shape != t.shape:
            raise ValueError(
                f"CoSS compares embeddings of one shape (b, d), got student {tuple(s.shape)} and teacher "
                f"{tuple(t.shape)}: give the student a head (--head) of the teacher's dimension."
            )
        return s, t
