"""NST: neuron selectivity transfer."""

import torch
from torch import Tensor

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, match_size, pairs_of_maps
from coss_hf.utils.vectors import l2_normalize


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Compute the mean over images and pairs of channels of ``<x_i, y_j>^2``, for ``(b, c, h * w)``."""
    return (x @ y.mT).square().mean()


class NSTLoss(DistillationLoss):
    """Neuron selectivity transfer: match the distributions of the channels of an image.

    ``loss = beta * sum over pairs of maps of k(T, T) + k(S, S) - 2 k(S, T)``, the squared maximum
    mean discrepancy with the kernel ``<x, y>^2``. ``k(X, Y)`` is its mean over images and pairs of
    channels, where each channel of an image has length 1 over its positions. The larger map is
    averaged down to the smaller.

    Shapes: maps ``(b, c, h, w)``, as many of the student as of the teacher; channels and sizes may
    differ.

    Several processes: the loss is the mean over the images of this process, which is exact where
    all have as many.

    Use when: both networks are convolutional with stages that correspond but different numbers of
    channels. As AT, it says nothing about the embedding itself, so add a method of embeddings:
    ``nst + coss``.

    Args:
        beta: Scale of the loss.

    Returns (when called): ``loss``, and ``loss_pair0``, ``loss_pair1``, ... without ``beta``.

    Raises:
        ValueError: A weight that is negative or not finite; numbers of maps that differ, or no
            maps.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.nst import NSTLoss
        >>> left = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
        >>> student = Features(torch.zeros(1, 8), (left,))
        >>> teacher = Features(torch.zeros(1, 8), (left.flip(3),))  # active on the right
        >>> round(NSTLoss(beta=1.0)(student, teacher)["loss"].item(), 4)
        2.0

    References:
        Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer
        (arXiv:1707.01219), equation 6 with d = 2, c = 0. Code compared with:
        github.com/HobbitLong/RepDistiller, distiller_zoo/NST.py.
    """

    name = "nst"
    reads = "maps"
    embedding_as_map = False
    citation = Citation(
        authors="Huang, Z. and Wang, N.",
        title="Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        year=2017,
        arxiv="1707.01219",
    )

    def __init__(self, beta: float = 50.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        parts = {}
        for i, (s, t) in enumerate(pairs_of_maps(self.name, student, teacher)):
            with full_precision(s.device):
                s, t = match_size(s, t)
                s = l2_normalize(s.flatten(2))
                t = l2_normalize(t.flatten(2))
                parts[f"loss_pair{i}"] = _kernel(t, t) + _kernel(s, s) - 2 * _kernel(s, t)
        return {"loss": self.beta * torch.stack(list(parts.values())).sum(), **parts}
