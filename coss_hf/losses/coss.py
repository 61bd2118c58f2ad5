"""CoSS: feature similarity plus space similarity."""

import torch
from torch import Tensor, nn

from coss_hf.distributed import all_reduce_sum, world_size
from coss_hf.features import Features

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


def mean_cosines(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine per row and per column of ``s`` and ``t`` ``(b, d)``, over the batch of all processes.

    Computed in float32 or wider, also under autocast.
    """
    with torch.autocast(s.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
        s, t = s.to(dtype), t.to(dtype)
        product, s_squares, t_squares = s * t, s * s, t * t
        # A row needs no other process, only the global count; a column is a sum over all of them.
        rows = _cosine(product.sum(1), s_squares.sum(1), t_squares.sum(1)).sum()
        columns = torch.stack([product.sum(0), s_squares.sum(0), t_squares.sum(0)])
        count = s.shape[0]
        if world_size() > 1:
            rows, count = all_reduce_sum(torch.stack([rows, rows.new_full((), count)])).unbind()
            columns = all_reduce_sum(columns)
        return rows / count, _cosine(*columns).mean()


class CoSSLoss(nn.Module):
    """Space-similarity distillation loss.

    ``loss = beta * (L_co + lambda_ss * L_ss)`` with ``L_co = -mean_i cos(S[i, :], T[i, :])`` over images and
    ``L_ss = -mean_j cos(S[:, j], T[:, j])`` over feature dimensions. ``L_ss`` is a statistic of the whole batch: over
    several processes both terms are those of the global batch, from three all-reduced vectors of length d.

    Args:
        beta: scale of the whole loss (50 in the authors' CIFAR code).
        lambda_ss: weight of the space term.

    Call with student and teacher ``Features`` whose embeddings are ``(b, d)``; ``index`` is not used. Computed in
    float32 or wider. Returns scalars ``loss``, ``l_co`` and ``l_ss`` (the latter two without ``beta``).

    Raises:
        ValueError: embeddings that are not both ``(b, d)``; a weight that is negative or not finite.

    References:
        Singh and Wang, Simple Unsupervised Knowledge Distillation With Space Similarity, ECCV 2024
        (arXiv:2409.13939), Algorithm 1. Original code: github.com/paganpasta/coss-pytorch.
    """

    def __init__(self, beta: float = 50.0, lambda_ss: float = 1.0):
        super().__init__()
        for name, value in (("beta", beta), ("lambda_ss", lambda_ss)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be a finite number >= 0.")
        self.beta, self.lambda_ss = beta, lambda_ss

    def extra_repr(self) -> str:
        return f"beta={self.beta}, lambda_ss={self.lambda_ss}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = student.embedding, teacher.embedding.detach()
        if s.dim() != 2 or s.shape != t.shape:
            raise ValueError(
                f"CoSS compares embeddings of one shape (b, d), got student {tuple(s.shape)} and teacher "
                f"{tuple(t.shape)}: give the student a head (--head) of the teacher's dimension."
            )
        co, ss = mean_cosines(s, t)
        return {"loss": -self.beta * (co + self.lambda_ss * ss), "l_co": -co, "l_ss": -ss}
