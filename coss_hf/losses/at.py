"""AT: attention transfer."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, full_precision, match_size, pairs_of_maps
from coss_hf.utils.vectors import l2_normalize


def attention(x: Tensor, p: float = 2.0) -> Tensor:
    """Attention ``(b, h * w)`` of a map ``(b, c, h, w)``: mean over channels of ``|x|^p``, at unit length an image."""
    return l2_normalize(x.abs().pow(p).mean(1).flatten(1))


class ATLoss(nn.Module):
    """Attention transfer: where in the image the networks are active, at the end of every stage.

    ``loss = beta * sum over pairs of maps of mean (q(S) - q(T))^2``, the mean over images and positions, with ``q`` the
    mean over channels of ``|x|^p``, divided by its Euclidean norm over the positions of an image. The larger map is
    averaged down to the smaller. The paper takes the norm of the difference; its code, and this, the mean square.

    Several processes: the mean over the images of this one, exact where all have as many.

    Args:
        beta: scale of the whole loss.
        p: exponent.

    Call with ``Features`` whose maps ``(b, c, h, w)`` are as many as each other. Returns ``loss`` and ``loss_pair0``,
    ``loss_pair1``, ... (without ``beta``).

    Raises:
        ValueError: a weight that is negative or not finite; numbers of maps that differ, or none.

    References:
        Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017 (arXiv:1612.03928). Original code:
        github.com/szagoruyko/attention-transfer.
    """

    uses_maps = True
    same_dim = False

    def __init__(self, beta: float = 1000.0, p: float = 2.0):
        super().__init__()
        check_weights(beta=beta, p=p)
        self.beta, self.p = beta, p

    def extra_repr(self) -> str:
        return f"beta={self.beta}, p={self.p}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        parts = {}
        for i, (s, t) in enumerate(pairs_of_maps("at", student, teacher)):
            with full_precision(s.device):
                s, t = match_size(s, t)
                parts[f"loss_pair{i}"] = (attention(s, self.p) - attention(t, self.p)).square().mean()
        return {"loss": self.beta * torch.stack(list(parts.values())).sum(), **parts}
