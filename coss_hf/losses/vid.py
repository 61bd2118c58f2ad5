"""VID: variational information distillation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, last_maps, match_size, pairs_of_maps, widen

SMALLEST_VARIANCE = 1e-5
FIRST_VARIANCE = 5.0
STAGES = ("all", "last")


class VIDLoss(DistillationLoss):
    """Variational information distillation: maximise the likelihood of the teacher's maps, given the student's.

    ``loss = beta * mean of ((mu(S) - T)^2 / v_c + log v_c) / 2`` over images, channels ``c`` and
    positions, summed over the maps of all stages, each with its own ``mu`` and variances. ``mu`` is
    three 1x1 convolutions without bias, with ReLU between them. The variance
    ``v_c = log(1 + exp(a_c)) + 1e-5`` of a channel is learnt and starts at 5. The larger map is
    averaged down to the smaller. The loss can be negative.

    Shapes: maps ``(b, c, h, w)``, whose channels and sizes may differ. An embedding counts as a map
    of one position where a network gives no maps.

    Several processes: the loss is the mean over the images of this process, which is exact where
    all have as many.

    Use when: the maps should agree position by position, and some channels of the teacher are
    noisy: they get a large variance and count less. A strong baseline where both networks are
    convolutional. With a transformer all stages are all layers, each with convolutions of its own:
    ``stages="last"`` is cheaper.

    Args:
        student_dim: Channels of the student's last map, or dimension of its embedding.
        teacher_dim: Channels of the teacher's last map, or dimension of its embedding.
        student_dims: Channels of all of the student's maps; without them the last map alone is compared.
        teacher_dims: Channels of all of the teacher's maps, as many.
        beta: Scale of the loss.
        stages: ``all``, or ``last`` for the last map alone.

    Returns (when called): ``loss``.

    Raises:
        ValueError: A weight that is negative or not finite; maps of other numbers of channels; unknown
            ``stages``; numbers of maps that differ.

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
        github.com/HobbitLong/RepDistiller, distiller_zoo/VID.py, which is applied to all stages.
    """

    name = "vid"
    reads = "maps"
    revision = 2  # 1: the last map alone
    citation = Citation(
        authors="Ahn, S. and others",
        title="Variational Information Distillation for Knowledge Transfer",
        venue="CVPR",
        year=2019,
        arxiv="1904.05835",
    )

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        student_dims: Sequence[int] = (),
        teacher_dims: Sequence[int] = (),
        beta: float = 1.0,
        stages: str = "all",
    ):
        super().__init__()
        check_weights(beta=beta)
        if stages not in STAGES:
            raise ValueError(f"stages={stages!r} is unknown: choose one of {', '.join(STAGES)}.")
        self.beta = beta
        self.stages = stages
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
        self.earlier = nn.ModuleList()
        if stages == "all":
            if len(student_dims) != len(teacher_dims):
                raise ValueError(
                    f"stages='all' compares maps in pairs, but student_dims={tuple(student_dims)} and "
                    f"teacher_dims={tuple(teacher_dims)}: give as many of both, or stages='last'."
                )
            pairs = zip(student_dims[:-1], teacher_dims[:-1])
            self.earlier.extend(VIDLoss(student_dim=student, teacher_dim=teacher) for student, teacher in pairs)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, stages={self.stages}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        loss = self._of_last_map(student, teacher)
        if self.earlier:
            pairs = pairs_of_maps(self.name, student, teacher)
            loss = loss + sum(part([s], [t])["loss"] for part, (s, t) in zip(self.earlier, pairs))
        return {"loss": self.beta * loss}

    def _of_last_map(self, student: Features, teacher: Features) -> Tensor:
        s, t = last_maps(self.name, student, teacher, student_dim=self.student_dim, teacher_dim=self.teacher_dim)
        s, t = match_size(s, t)
        with full_precision(s.device):
            mu, t = widen(self.regressor(s.to(self.log_scale.dtype)), t)
            variance = softplus(self.log_scale.to(mu.dtype))[:, None, None] + SMALLEST_VARIANCE
            return 0.5 * ((mu - t).square() / variance + variance.log()).mean()
