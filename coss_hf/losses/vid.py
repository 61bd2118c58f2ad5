"""VID: variational information distillation."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, full_precision, last_maps, match_size, widen

SMALLEST_VARIANCE, FIRST_VARIANCE = 1e-5, 5.0


class VIDLoss(nn.Module):
    """Variational information distillation: a Gaussian around what the student predicts, as likely as can be.

    ``loss = beta * mean of ((mu(S) - T)^2 / v_c + log v_c) / 2`` over images, channels ``c`` and positions of the last
    map. ``mu`` is three 1x1 convolutions without bias, ReLU between them; the variance ``v_c = log(1 + exp(a_c)) +
    1e-5`` of a channel is learnt and starts at 5. The larger map is averaged down to the smaller. An embedding counts
    as a map of one position where a network gives no maps. The loss can be negative.

    Several processes: the mean over the images of this one, exact where all have as many.

    Args:
        student_dim, teacher_dim: channels of the last maps, or dimensions of the embeddings.
        beta: scale of the whole loss.

    Call with ``Features``. Returns ``loss``.

    Raises:
        ValueError: a weight that is negative or not finite; maps of other numbers of channels.

    References:
        Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019 (arXiv:1904.05835),
        equations 3 to 6. Code compared with: github.com/HobbitLong/RepDistiller, distiller_zoo/VID.py.
    """

    uses_maps = True
    same_dim = False

    def __init__(self, *, student_dim: int, teacher_dim: int, beta: float = 1.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta, self.dims = beta, (student_dim, teacher_dim)
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
        s, t = match_size(*last_maps("vid", student, teacher, self.dims))
        with full_precision(s.device):
            mu, t = widen(self.regressor(s.to(self.log_scale.dtype)), t)
            variance = softplus(self.log_scale.to(mu.dtype))[:, None, None] + SMALLEST_VARIANCE
            loss = 0.5 * ((mu - t).square() / variance + variance.log()).mean()
        return {"loss": self.beta * loss}
