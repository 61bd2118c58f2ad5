"""KD: soft labels of a classifier."""

from torch import Tensor, nn
from torch.nn.functional import kl_div

from coss_hf.features import Features
from coss_hf.losses.common import check_positive, check_weights, full_precision, widen


class KDLoss(nn.Module):
    """``loss = beta * T^2 * mean_n KL(softmax(z^t_n / T) || softmax(z^s_n / T))`` on the logits ``z`` ``(b, classes)``.

    The mean is over this process's images: with shards of one size, averaged over processes, that of the whole batch.

    Args:
        beta: scale of the loss.
        temperature: ``T``.

    Call with student and teacher ``Features`` that have logits; ``index`` is not used.

    Raises:
        ValueError: a network without logits, or with other classes; a weight or temperature that cannot be.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network (arXiv:1503.02531), section 2.
    """

    uses_maps = False
    needs_logits = True
    same_dim = False

    def __init__(self, beta: float = 1.0, temperature: float = 4.0):
        super().__init__()
        check_weights(beta=beta)
        check_positive(temperature=temperature)
        self.beta, self.temperature = beta, temperature

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        shapes = [None if x.logits is None else tuple(x.logits.shape) for x in (student, teacher)]
        if None in shapes or shapes[0] != shapes[1]:
            raise ValueError(
                f"--method kd compares logits (b, classes), got student {shapes[0]} and teacher {shapes[1]}: choose "
                "networks with a classifier of the same classes, or a method of embeddings (coss)."
            )
        s, t = widen(student.logits, teacher.logits)
        with full_precision(s.device):
            s, t = ((z / self.temperature).log_softmax(1) for z in (s, t))
            divergence = kl_div(s, t, reduction="batchmean", log_target=True)
        return {"loss": self.beta * self.temperature**2 * divergence}
