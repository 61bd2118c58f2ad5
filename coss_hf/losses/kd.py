"""KD: soft labels of a classifier."""

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from coss_hf.features import Features
from coss_hf.losses.common import check_positive, check_weights, frozen, full_precision, widen


class KDLoss(nn.Module):
    """``loss = beta * T^2 * mean_n KL(softmax(z^t_n / T) || softmax(z^s_n / T))`` on the logits ``z`` ``(b, classes)``.

    The teacher's logits are those of its own frozen classifier on its embedding, the student's those of a linear layer
    that is learnt with the loss. Logits that ``Features`` carry are taken as they are.

    The mean is over this process's images: with shards of one size, averaged over processes, that of the whole batch.

    Args:
        beta: scale of the loss.
        temperature: ``T``.
        student_dim: of the student's embedding.
        classifier: the teacher's, copied and never trained; None where ``Features`` carry logits.

    Call with student and teacher ``Features``; ``index`` is not used. Returns ``loss``.

    Raises:
        ValueError: no logits, or of other classes; a weight or temperature that cannot be.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531), section 2.
    """

    uses_maps = False
    same_dim = False

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
        self.beta, self.temperature = beta, temperature
        self.teacher_fc = self.student_fc = None
        if classifier is not None:
            self.teacher_fc = frozen(classifier)
            self.student_fc = nn.Linear(student_dim, classifier.out_features)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, temperature={self.temperature}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        with full_precision(student.embedding.device):
            s, t = _logits(student, self.student_fc), _logits(teacher, self.teacher_fc)
            shapes = [None if z is None else tuple(z.shape) for z in (s, t)]
            if None in shapes or shapes[0] != shapes[1]:
                raise ValueError(
                    f"--method kd compares logits (b, classes), got student {shapes[0]} and teacher {shapes[1]}: "
                    "choose networks with a classifier of the same classes, or a method of embeddings (coss)."
                )
            s, t = ((z / self.temperature).log_softmax(1) for z in widen(s, t))
            divergence = kl_div(s, t, reduction="batchmean", log_target=True)
        return {"loss": self.beta * self.temperature**2 * divergence}


def _logits(features: Features, layer: nn.Linear | None) -> Tensor | None:
    if features.logits is not None or layer is None:
        return features.logits
    return layer(features.embedding.to(torch.promote_types(layer.weight.dtype, torch.float32)))
