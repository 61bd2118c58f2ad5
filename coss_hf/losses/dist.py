"""DIST: correlation instead of distance, within each image and within each dimension."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_positive, check_weights, embeddings_of_one_shape, full_precision
from coss_hf.utils.distributed import all_gather

VARIANTS = ("features_raw", "softmax", "coss_authors")


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along ``dim``; a constant student vector has none, and gets no gradient."""
    x, y = (v - v.mean(dim, keepdim=True) for v in (x, y))
    norm = x.norm(dim=dim)
    return torch.where(norm == 0, 0.0, (x * y).sum(dim) / (norm * y.norm(dim=dim) + 1e-8))


def pixels_as_rows(x: Tensor) -> Tensor:
    """``(b, c, h, w)`` as ``(b * h * w, c)``; ``(b, c)`` as it is."""
    return x.movedim(1, -1).flatten(0, -2)


def inter_and_intra(
    s: Tensor, t: Tensor, variant: str = "softmax", student_temperature: float = 0.1, teacher_temperature: float = 0.07
) -> tuple[Tensor, Tensor]:
    """The two parts of ``DISTLoss`` for rows ``(b, c)``, or maps ``(b, c, h, w)``, of student and teacher."""
    s, t = pixels_as_rows(s), pixels_as_rows(t)
    rows = columns = (s, t)
    if variant == "softmax":
        rows = columns = (s.softmax(1), t.softmax(1))
    elif variant == "coss_authors":
        s, t = s / student_temperature, t / teacher_temperature
        rows, columns = (s.softmax(1), t.softmax(1)), (s.softmax(0), t.softmax(0))
    return 1 - _correlation(*rows, 1).mean(), 1 - _correlation(*columns, 0).mean()


class DISTLoss(nn.Module):
    """``loss = beta * (inter_weight * loss_inter + intra_weight * loss_intra)`` on ``(b, d)`` embeddings.

    ``loss_inter = 1 - mean_i r(S[i, :], T[i, :])`` over images, ``loss_intra = 1 - mean_j r(S[:, j], T[:, j])`` over
    dimensions, with Pearson's correlation ``r``. The batch is that of all processes: value and gradient equal those of
    one process, uneven shards too.

    Args:
        beta: scale of the whole loss.
        inter_weight, intra_weight: of the two parts.
        variant: what is correlated. ``features_raw``: embeddings; ``softmax``: their softmax over dimensions, as the
            original does with logits; ``coss_authors``: the same with temperatures, and for ``loss_intra`` the softmax
            along the batch.
        student_temperature, teacher_temperature: of ``coss_authors``.

    Raises:
        ValueError: embeddings of different shapes; a weight, temperature or variant that cannot be.

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022 (arXiv:2205.10536). Original code:
        github.com/hunto/DIST_KD; ``coss_authors``: github.com/paganpasta/coss-pytorch.
    """

    uses_maps = False
    same_dim = True

    def __init__(
        self,
        beta: float = 1.0,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        variant: str = "features_raw",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
    ):
        super().__init__()
        check_weights(beta=beta, inter_weight=inter_weight, intra_weight=intra_weight)
        check_positive(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is unknown: choose one of {', '.join(VARIANTS)}.")
        self.beta, self.inter_weight, self.intra_weight = beta, inter_weight, intra_weight
        self.options = variant, student_temperature, teacher_temperature

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = (all_gather(x) for x in embeddings_of_one_shape("dist", student, teacher))
        with full_precision(s.device):
            inter, intra = inter_and_intra(s, t, *self.options)
        loss = self.beta * (self.inter_weight * inter + self.intra_weight * intra)
        return {"loss": loss, "loss_inter": inter, "loss_intra": intra}
