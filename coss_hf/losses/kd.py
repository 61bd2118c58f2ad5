"""KD: soft labels of a classifier."""

from torch import Tensor, nn
from torch.nn.functional import kl_div

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_positive, check_weights, frozen, full_precision, widen


class KDLoss(DistillationLoss):
    """Knowledge distillation: match the softened class probabilities of the teacher's classifier.

    ``loss = beta * T^2 * mean_n KL(softmax(z^t_n / T) || softmax(z^s_n / T))`` on the logits ``z``.
    The teacher's logits are those of its own frozen classifier on its embedding, the student's
    those of a linear layer that is learnt with the loss. Logits that ``Features`` carry are taken
    as they are.

    Shapes: embeddings ``(b, d)``, whose dimensions may differ, or logits ``(b, classes)``.

    Several processes: the loss is the mean over the images of this process, which is exact where
    all have as many.

    Use when: the teacher was trained on labels and has its classifier. The student
    learns what the classes need, and no more: choose another method for embeddings that shall serve
    other tasks.

    Args:
        beta: Scale of the loss.
        temperature: Temperature ``T``.
        student_dim: Dimension of the student's embedding; not needed without a classifier.
        classifier: The teacher's classifier, which is copied and never trained; None where
            ``Features`` carry logits.

    Returns (when called): ``loss``.

    Raises:
        ValueError: No logits, or logits of other classes; an invalid weight or temperature.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.kd import KDLoss
        >>> loss = KDLoss(temperature=1.0)
        >>> student = Features(torch.zeros(1, 3), logits=torch.tensor([[0.0, 0.0]]))  # probabilities 1/2, 1/2
        >>> teacher = Features(torch.zeros(1, 3), logits=torch.tensor([[0.0, 99.0]]))  # probabilities 0, 1
        >>> round(loss(student, teacher)["loss"].item(), 4)  # log 2
        0.6931

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531), section 2.
    """

    name = "kd"
    reads = "logits"
    classifier = "required"
    citation = Citation(
        authors="Hinton, G. and Vinyals, O. and Dean, J.",
        title="Distilling the Knowledge in a Neural Network",
        year=2015,
        arxiv="1503.02531",
    )

    def __init__(
        self,
        beta: float = 1.0,
        temperature: float = 4.0,
        *,
        student_dim: int | None = None,
        classifier: nn.Linear | None = None,
    ):
        super().__init__()
        check_weights(beta=beta)
        check_positive(temperature=temperature)
        self.beta = beta
        self.temperature = temperature
        self.teacher_fc = None
        self.student_fc = None
        if classifier is not None:
            self.teacher_fc = frozen(classifier)
            self.student_fc = nn.Linear(student_dim, classifier.out_features)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, temperature={self.temperature}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        with full_precision(student.embedding.device):
            s = _logits(student, self.student_fc)
            t = _logits(teacher, self.teacher_fc)
            _check_logits(s, t)
            s, t = widen(s, t)
            s = (s / self.temperature).log_softmax(1)
            t = (t / self.temperature).log_softmax(1)
            divergence = kl_div(s, t, reduction="batchmean", log_target=True)
        return {"loss": self.beta * self.temperature**2 * divergence}


def _logits(features: Features, layer: nn.Linear | None) -> Tensor | None:
    if features.logits is not None or layer is None:
        return features.logits
    return layer(features.embedding.to(layer.weight.dtype))


def _check_logits(s: Tensor | None, t: Tensor | None) -> None:
    s_shape = None if s is None else tuple(s.shape)
    t_shape = None if t is None else tuple(t.shape)
    if s_shape is None or s_shape != t_shape:
        raise ValueError(
            f"--method kd compares logits (b, classes), got student {s_shape} and teacher {t_shape}: "
            "choose networks with a classifier of the same classes, or a method of embeddings (coss)."
        )
