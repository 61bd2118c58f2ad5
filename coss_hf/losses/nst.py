"""NST: neuron selectivity transfer."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, full_precision, match_size, pairs_of_maps
from coss_hf.utils.vectors import l2_normalize


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Mean over images and pairs of channels of ``<x_i, y_j>^2``, for ``(b, c, h * w)``."""
    return (x @ y.mT).square().mean()


class NSTLoss(nn.Module):
    """Neuron selectivity transfer: the channels of an image as samples of a distribution, and the distance of two.

    ``loss = beta * sum over pairs of maps of k(T, T) + k(S, S) - 2 k(S, T)``, the squared maximum mean discrepancy with
    the kernel ``<x, y>^2``: ``k(X, Y)`` is its mean over images and pairs of channels, each channel of an image at unit
    length over its positions. The larger map is averaged down to the smaller; numbers of channels may differ.

    Several processes: the mean over the images of this one, exact where all have as many.

    Args:
        beta: scale of the whole loss.

    Call with ``Features`` whose maps ``(b, c, h, w)`` are as many as each other. Returns ``loss`` and ``loss_pair0``,
    ``loss_pair1``, ... (without ``beta``).

    Raises:
        ValueError: a weight that is negative or not finite; numbers of maps that differ, or none.

    References:
        Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer (arXiv:1707.01219),
        equation 6 with d = 2, c = 0. Code compared with: github.com/HobbitLong/RepDistiller, distiller_zoo/NST.py.
    """

    uses_maps = True
    same_dim = False

    def __init__(self, beta: float = 50.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        parts = {}
        for i, (s, t) in enumerate(pairs_of_maps("nst", student, teacher)):
            with full_precision(s.device):
                s, t = (l2_normalize(x.flatten(2)) for x in match_size(s, t))
                parts[f"loss_pair{i}"] = _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)
        return {"loss": self.beta * torch.stack(list(parts.values())).sum(), **parts}
