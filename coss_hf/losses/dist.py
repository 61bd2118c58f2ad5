"""DIST: correlation instead of distance, within each image and within each dimension."""

import torch
from torch import Tensor

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_positive, check_weights, embeddings_of_one_shape, full_precision
from coss_hf.utils.distributed import all_gather

VARIANTS = ("features_raw", "softmax", "coss_authors")
ROUNDING = 16  # by how many roundings the mean of equal values may be off, relative to them


def _correlation(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """Compute Pearson's correlation along ``dim``; a constant vector has none: it counts as 0, without gradient."""
    x, x_norm, x_constant = _centred(x, dim)
    y, y_norm, y_constant = _centred(y, dim)
    return torch.where(x_constant | y_constant, 0.0, (x * y).sum(dim) / (x_norm * y_norm + 1e-8))


def _centred(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x`` less its mean along ``dim``, the norms of that, and whether it is nothing but rounding noise."""
    centred = x - x.mean(dim, keepdim=True)
    norm = centred.norm(dim=dim)
    with torch.no_grad():
        constant = norm <= ROUNDING * torch.finfo(x.dtype).eps * x.norm(dim=dim)
    return centred, norm, constant


def pixels_as_rows(x: Tensor) -> Tensor:
    """Reshape ``(b, c, h, w)`` to ``(b * h * w, c)``; return ``(b, c)`` as it is."""
    return x.movedim(1, -1).flatten(0, -2)


def inter_and_intra(
    s: Tensor, t: Tensor, variant: str = "softmax", student_temperature: float = 0.1, teacher_temperature: float = 0.07
) -> tuple[Tensor, Tensor]:
    """Compute the two parts of ``DISTLoss`` for rows ``(b, c)``, or maps ``(b, c, h, w)``, of student and teacher."""
    s = pixels_as_rows(s)
    t = pixels_as_rows(t)
    if variant == "softmax":
        rows = (s.softmax(1), t.softmax(1))
        columns = rows
    elif variant == "coss_authors":
        s = s / student_temperature
        t = t / teacher_temperature
        rows = (s.softmax(1), t.softmax(1))
        columns = (s.softmax(0), t.softmax(0))
    else:
        rows = (s, t)
        columns = (s, t)
    inter = 1 - _correlation(*rows, 1).mean()
    intra = 1 - _correlation(*columns, 0).mean()
    return inter, intra


class DISTLoss(DistillationLoss):
    """Correlation of student and teacher, per image and per dimension.

    ``loss = beta * (inter_weight * loss_inter + intra_weight * loss_intra)`` with
    ``loss_inter = 1 - mean_i r(S[i, :], T[i, :])`` over images,
    ``loss_intra = 1 - mean_j r(S[:, j], T[:, j])`` over dimensions, and Pearson's correlation
    ``r``.

    Shapes: embeddings ``(b, d)`` of both networks.

    Several processes: the batch is that of all processes. Value and gradient equal those of one
    process, for uneven shards, too.

    Use when: offset and scale of the embeddings should not matter. It is close to CoSS, which
    compares cosines where this loss compares correlations.

    Args:
        beta: Scale of the loss.
        inter_weight: Weight of ``loss_inter``.
        intra_weight: Weight of ``loss_intra``.
        variant: What is correlated. ``features_raw``: the embeddings; ``softmax``: their softmax
            over dimensions, as the original does with logits; ``coss_authors``: the same with
            temperatures, and for ``loss_intra`` the softmax along the batch.
        student_temperature: Temperature of the student in ``coss_authors``.
        teacher_temperature: Temperature of the teacher in ``coss_authors``.

    Returns (when called): ``loss``; ``loss_inter`` and ``loss_intra`` without weights.

    Raises:
        ValueError: Embeddings of different shapes; an invalid weight, temperature or variant.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.dist import DISTLoss
        >>> teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> student = 2 * teacher + 3  # offset and scale do not matter
        >>> output = DISTLoss()(Features(student), Features(teacher))
        >>> {name: round(abs(value.item()), 4) for name, value in output.items()}
        {'loss': 0.0, 'loss_inter': 0.0, 'loss_intra': 0.0}

    References:
        Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022
        (arXiv:2205.10536). Original code: github.com/hunto/DIST_KD; ``coss_authors``:
        github.com/paganpasta/coss-pytorch.
    """

    name = "dist"
    reads = "embedding"
    couples_images = True
    same_dim = True
    citation = Citation(
        authors="Huang, T. and others",
        title="Knowledge Distillation from A Stronger Teacher",
        venue="NeurIPS",
        year=2022,
        arxiv="2205.10536",
    )

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
        self.beta = beta
        self.inter_weight = inter_weight
        self.intra_weight = intra_weight
        self.variant = variant
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = embeddings_of_one_shape(self.name, student, teacher)
        s = all_gather(s)
        t = all_gather(t)
        with full_precision(s.device):
            inter, intra = inter_and_intra(s, t, self.variant, self.student_temperature, self.teacher_temperature)
        loss = self.beta * (self.inter_weight * inter + self.intra_weight * intra)
        return {"loss": loss, "loss_inter": inter, "loss_intra": intra}
