"""VID: variational information distillation."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, last_maps, match_size, widen

SMALLEST_VARIANCE = 1e-5
FIRST_VARIANCE = 5.0


class VIDLoss(DistillationLoss):
    """Variational information distillation: maximise the likelihood of the teacher's last map, given the student's.

    ``loss = beta * mean of ((mu(S) - T)^2 / v_c + log v_c) / 2`` over images, channels ``c`` and
    positions of the last map. ``mu`` is three 1x1 convolutions without bias, with ReLU between
    them. The variance ``v_c = log(1 + exp(a_c)) + 1e-5`` of a channel is learnt and starts at 5.
    The larger map is averaged down to the smaller. The loss can be negative.

    Shapes: last maps ``(b, c, h, w)``, whose channels and sizes may differ. An embedding counts as
    a map of one position where a network gives no maps.

    Several processes: the loss is the mean over the images of this process, which is exact where
    all have as many.

    Use when: the last maps should agree position by position, and some channels of the teacher are
    noisy: they get a large variance and count less. A strong baseline where both networks are
    convolutional.

    Args:
        student_dim: Channels of the student's last map, or dimension of its embedding.
        teacher_dim: Channels of the teacher's last map, or dimension of its embedding.
        beta: Scale of the loss.

    Returns (when called): ``loss``.

    Raises:
        ValueError: A weight that is negative or not finite; maps of other numbers of channels.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.vid import VIDLoss
        >>> loss = VIDLoss(student_dim=3, teacher_dim=4)
        >>> student = Features(torch.zeros(2, 3), (torch.zeros(2, 3, 8, 8),))  # predicts 0 whatever the weights are
        >>> teacher = Features(torch.zeros(2, 4), (torch.zeros(2, 4, 4, 4),))
        >>> round(loss(student, teacher)["loss"].item(), 4)  # log(5) / 2
        0.8047

    References:
        Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019
        (arXiv:1904.05835), equations 3 to 6. Code compared with:
        github.com/HobbitLong/RepDistiller, distiller_zoo/VID.py.
    """

    name = "vid"
    reads = "last_map"
    citation = Citation(
        authors="Ahn, S. and others",
        title="Variational Information Distillation for Knowledge Transfer",
        venue="CVPR",
        year=2019,
        arxiv="1904.05835",
    )

    def __init__(self, *, student_dim: int, teacher_dim: int, beta: float = 1.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.regressor = nn.Sequential(
            nn.Conv2d(student_dim, teacher_dim, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_dim, teacher_dim, 1, bias=False),
        )
        start = math.log(math.expm1(FIRST_VARIANCE - SMALLEST_VARIANCE))
        self.log_scale = nn.Parameter(torch.full((teacher_dim,), start))

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = last_maps(self.name, student, teacher, student_dim=self.student_dim, teacher_dim=self.teacher_dim)
        s, t = match_size(s, t)
        with full_precision(s.device):
            mu, t = widen(self.regressor(s.to(self.log_scale.dtype)), t)
            variance = softplus(self.log_scale.to(mu.dtype))[:, None, None] + SMALLEST_VARIANCE
            loss = 0.5 * ((mu - t).square() / variance + variance.log()).mean()
        return {"loss": self.beta * loss}
