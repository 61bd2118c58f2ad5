"""CoSS: feature similarity plus space similarity."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights
from coss_hf.utils.distributed import all_reduce_sum

EPS = 1e-12


def _cosine(dot: Tensor, student_squares: Tensor, teacher_squares: Tensor) -> Tensor:
    """Cosines from inner products and squared norms, norms clamped at 1e-12.

    A student vector that is exactly zero has no direction: it gets no gradient, where the literal derivative of the
    clamp would be about 1e12.
    """
    zero = student_squares == 0
    # sqrt has an infinite slope at 0: keep it out of the graph.
    student_norm = torch.where(zero, 1.0, student_squares).sqrt().clamp_min(EPS)
    cosine = dot / (student_norm * teacher_squares.sqrt().clamp_min(EPS))
    return torch.where(zero, 0.0, cosine)


def cosine_totals(s: Tensor, t: Tensor) -> Tensor:
    """What the mean cosines of a batch ``(b, d)`` are made of, as one vector ``(2 + 3d,)`` of sums.

    The cosines of all rows, the number of rows, and for each column s·t, s² and t²: the sums of several processes or
    micro-batches add up to those of the whole batch. Computed in float32 or wider, also under autocast.
    """
    with torch.autocast(s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
        s, t = s.to(dtype), t.to(dtype)
        product, s_squares, t_squares = s * t, s * s, t * t
        rows = _cosine(product.sum(1), s_squares.sum(1), t_squares.sum(1)).sum()
        count = rows.new_full((), s.shape[0])
        return torch.cat([torch.stack([rows, count]), product.sum(0), s_squares.sum(0), t_squares.sum(0)])


def mean_cosines(s: Tensor, t: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean cosine per row and per column of ``s`` and ``t`` ``(b, d)``, over the batch of all processes.

    Args:
        rest: ``cosine_totals`` of what else belongs to the batch, over all processes.
    """
    totals = all_reduce_sum(cosine_totals(s, t))
    if rest is not None:
        totals = totals + rest
    with torch.autocast(s.device.type, enabled=False):
        (rows, count), columns = totals[:2], totals[2:].view(3, -1)
        return rows / count, _cosine(*columns).mean()


class CoSSLoss(nn.Module):
    """Space-similarity distillation loss.

    ``loss = beta * (lambda_co * L_co + lambda_ss * L_ss)`` with ``L_co = -mean_i cos(S[i, :], T[i, :])`` over images
    and ``L_ss = -mean_j cos(S[:, j], T[:, j])`` over feature dimensions. ``L_ss`` is a statistic of the whole
    batch: over several processes both terms are those of the global batch, from three all-reduced vectors of length d.

    Args:
        beta: scale of the whole loss (50 in the authors' CIFAR code).
        lambda_ss: weight of the space term.
        lambda_co: weight of the feature term; 1 in the paper but for the ablation of its Table 2.

    Call with student and teacher ``Features`` whose embeddings are ``(b, d)``; ``index`` is not used; ``rest``, with
    exact accumulation, holds the ``totals`` of the other micro-batches. Computed in float32 or wider. Returns scalars
    ``loss``, ``l_co`` and ``l_ss`` (the latter two without ``beta``).

    Raises:
        ValueError: embeddings that are not both ``(b, d)``; a weight that is negative or not finite.

    References:
        Singh and Wang, Simple Unsupervised Knowledge Distillation With Space Similarity, ECCV 2024
        (arXiv:2409.13939), Algorithm 1. Original code: github.com/paganpasta/coss-pytorch.
    """

    uses_maps = False
    same_dim = True

    def __init__(self, beta: float = 50.0, lambda_ss: float = 1.0, lambda_co: float = 1.0):
        super().__init__()
        check_weights(beta=beta, lambda_ss=lambda_ss, lambda_co=lambda_co)
        self.beta, self.lambda_ss, self.lambda_co = beta, lambda_ss, lambda_co

    def extra_repr(self) -> str:
        return f"beta={self.beta}, lambda_ss={self.lambda_ss}, lambda_co={self.lambda_co}"

    def totals(self, student: Features, teacher: Features) -> Tensor:
        """Sums ``(2 + 3d,)`` of this batch that a ``rest`` is added up from; see ``cosine_totals``."""
        return cosine_totals(*self._embeddings(student, teacher))

    def forward(
        self, student: Features, teacher: Features, index: Tensor | None = None, rest: Tensor | None = None
    ) -> dict[str, Tensor]:
        co, ss = mean_cosines(*self._embeddings(student, teacher), rest)
        return {"loss": -self.beta * (self.lambda_co * co + self.lambda_ss * ss), "l_co": -co, "l_ss": -ss}

    def _embeddings(self, student: Features, teacher: Features) -> tuple[Tensor, Tensor]:
        s, t = student.embedding, teacher.embedding.detach()
        if s.dim() != 2 or s.shape != t.shape:
            raise ValueError(
                f"CoSS compares embeddings of one shape (b, d), got student {tuple(s.shape)} and teacher "
                f"{tuple(t.shape)}: give the student a head (--head) of the teacher's dimension."
            )
        return s, t
