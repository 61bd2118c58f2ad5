"""SRRL: representation learning through the teacher's own classifier."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, frozen, full_precision, last_maps, widen


class SRRLLoss(nn.Module):
    """Softmax regression representation learning: the student's features do for the teacher's classifier.

    ``loss = beta * (loss_fm + weight * loss_sr)``. ``p_s`` is the spatial mean of ``ReLU(BatchNorm(conv1x1(S)))`` and
    ``p_t`` that of ``T``, the last maps; ``loss_fm`` is the mean of ``(p_s - p_t)^2`` over images and channels,
    ``loss_sr`` that of ``(C(p_s) - C(p_t))^2`` over images and classes of the teacher's frozen classifier ``C``.
    Without a classifier only ``loss_fm`` is left. An embedding counts as a map of one position.

    Several processes: the mean over the images of this one, exact where all have as many; batch norm's statistics are
    per process unless ``--sync_batch_norm`` is given.

    Args:
        student_dim, teacher_dim: channels of the last maps, or dimensions of the embeddings.
        classifier: from ``teacher_dim`` to the teacher's classes; copied, and never trained.
        beta, weight: scales of the whole loss and of its second term.

    Call with ``Features``. Returns ``loss``, ``loss_fm`` and, with a classifier, ``loss_sr``.

    Raises:
        ValueError: a weight that is negative or not finite; maps of other numbers of channels.

    References:
        Yang et al., Knowledge distillation via softmax regression representation learning, ICLR 2021. Code compared
        with: github.com/jingyang2017/KD_SRRL.
    """

    uses_maps = True
    same_dim = False

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
        self.beta, self.weight, self.dims = beta, weight, (student_dim, teacher_dim)
        layers = {"conv": nn.Conv2d(student_dim, teacher_dim, 1, bias=False), "bn": nn.BatchNorm2d(teacher_dim)}
        self.connector = nn.Sequential(OrderedDict(layers))
        fits = classifier is not None and classifier.in_features == teacher_dim
        self.teacher_fc = frozen(classifier) if fits else None

    def extra_repr(self) -> str:
        return f"beta={self.beta}, weight={self.weight}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = last_maps("srrl", student, teacher, self.dims)
        with full_precision(s.device):
            s, t = widen(self.connector(s.to(self.connector.conv.weight.dtype)).relu(), t)
            s, t = s.mean((2, 3)), t.mean((2, 3))
            parts = {"loss_fm": (s - t).square().mean()}
            loss = parts["loss_fm"]
            if self.teacher_fc is not None:
                dtype = self.teacher_fc.weight.dtype
                with torch.no_grad():
                    expected = self.teacher_fc(t.to(dtype))
                parts["loss_sr"] = (self.teacher_fc(s.to(dtype)) - expected).square().mean()
                loss = loss + self.weight * parts["loss_sr"]
        return {"loss": self.beta * loss, **parts}
