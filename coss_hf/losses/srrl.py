"""SRRL: representation learning through the teacher's own classifier."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, frozen, full_precision, last_maps, wide, widen


class SRRLLoss(DistillationLoss):
    """Softmax regression representation learning: the student's features must serve the teacher's classifier.

    ``loss = beta * (loss_fm + weight * loss_sr)``. ``p_s`` is the spatial mean of
    ``ReLU(BatchNorm(conv1x1(S)))`` and ``p_t`` that of ``T``, the last maps. ``loss_fm`` is the
    mean of ``(p_s - p_t)^2`` over images and channels, ``loss_sr`` that of ``(C(p_s) - C(p_t))^2``
    over images and classes of the teacher's frozen classifier ``C``. Without a classifier only
    ``loss_fm`` is left.

    Shapes: last maps ``(b, c, h, w)``, whose channels and sizes may differ. An embedding counts as
    a map of one position where a network gives no maps.

    Several processes: the loss is the mean over the images of this process, which is exact where
    all have as many; the statistics of batch norm are per process unless ``--sync_batch_norm`` is
    given.

    Use when: the teacher is convolutional and was trained on labels, so that it has a
    classifier of the pooled last map. Without a classifier it is a regression of pooled maps, a
    strong and fast baseline.

    Args:
        student_dim: Channels of the student's last map, or dimension of its embedding.
        teacher_dim: Channels of the teacher's last map, or dimension of its embedding.
        classifier: Classifier from ``teacher_dim`` to the teacher's classes, which is copied and
            never trained.
        beta: Scale of the loss.
        weight: Weight of ``loss_sr``.

    Returns (when called): ``loss``, ``loss_fm`` and, with a classifier, ``loss_sr``.

    Raises:
        ValueError: A weight that is negative or not finite; maps of other numbers of channels.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.srrl import SRRLLoss
        >>> loss = SRRLLoss(student_dim=3, teacher_dim=4, classifier=torch.nn.Linear(4, 10))
        >>> student = Features(torch.zeros(2, 3), (torch.ones(2, 3, 8, 8),))
        >>> teacher = Features(torch.ones(2, 4), (torch.ones(2, 4, 4, 4),))
        >>> list(loss(student, teacher))
        ['loss', 'loss_fm', 'loss_sr']

    References:
        Yang et al., Knowledge distillation via softmax regression representation learning, ICLR
        2021. Code compared
        with: github.com/jingyang2017/KD_SRRL.
    """

    name = "srrl"
    reads = "last_map"
    classifier = "optional"
    citation = Citation(
        authors="Yang, J. and others",
        title="Knowledge distillation via softmax regression representation learning",
        venue="ICLR",
        year=2021,
    )

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        classifier: nn.Linear | None = None,
        beta: float = 1.0,
        weight: float = 1.0,
    ):
        super().__init__()
        check_weights(beta=beta, weight=weight)
        self.beta = beta
        self.weight = weight
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        self.connector = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(student_dim, teacher_dim, 1, bias=False),
                bn=nn.BatchNorm2d(teacher_dim),
            )
        )
        self.teacher_fc = None
        if classifier is not None and classifier.in_features == teacher_dim:
            self.teacher_fc = frozen(classifier)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, weight={self.weight}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = last_maps(self.name, student, teacher, student_dim=self.student_dim, teacher_dim=self.teacher_dim)
        with full_precision(s.device):
            s, t = widen(self.connector(s.to(self.connector.conv.weight.dtype)).relu(), t)
            s = s.mean((2, 3))
            t = t.mean((2, 3))
            parts = {"loss_fm": (s - t).square().mean()}
            loss = parts["loss_fm"]
            if self.teacher_fc is not None:
                with torch.no_grad():
                    expected = self._logits(t)
                parts["loss_sr"] = (self._logits(s) - expected).square().mean()
                loss = loss + self.weight * parts["loss_sr"]
        return {"loss": self.beta * loss, **parts}

    def _logits(self, pooled: Tensor) -> Tensor:
        return wide(self.teacher_fc(pooled.to(self.teacher_fc.weight.dtype)))
