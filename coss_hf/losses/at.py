"""AT: attention transfer."""

import torch
from torch import Tensor

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, match_size, pairs_of_maps
from coss_hf.utils.vectors import l2_normalize


def attention(x: Tensor, p: float = 2.0) -> Tensor:
    """Compute the attention ``(b, h * w)`` of a map ``(b, c, h, w)``: the mean of ``|x|^p`` over the channels.

    The attention of each image has length 1.
    """
    return l2_normalize(x.abs().pow(p).mean(1).flatten(1))


class ATLoss(DistillationLoss):
    """Attention transfer: match where in the image the networks are active, at the end of every stage.

    ``loss = beta * sum over pairs of maps of mean (q(S) - q(T))^2``. The mean is over images and
    positions, and ``q`` is the mean of ``|x|^p`` over the channels, divided by its Euclidean norm
    over the positions of an image. The larger map is averaged down to the smaller. The paper takes
    the norm of the difference; its code, and this loss, take the mean of the squares.

    Shapes: maps ``(b, c, h, w)``, as many of the student as of the teacher; channels and sizes may
    differ.

    Several processes: the loss is the mean over the images of this process, which is exact where
    all have as many.

    Use when: both networks are convolutional with stages that correspond, and only the places of
    activity should agree. It says nothing about the embedding itself, so add a method of
    embeddings: ``at(beta=10) + coss``.

    Args:
        beta: Scale of the loss.
        p: Exponent of the activations, at least 1.

    Returns (when called): ``loss``, and ``loss_pair0``, ``loss_pair1``, ... without ``beta``.

    Raises:
        ValueError: A weight that is negative or not finite; an exponent below 1, whose gradient
            is not finite where a map is zero; numbers of maps that differ, or no maps.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.at import ATLoss
        >>> active = torch.eye(4).view(4, 1, 2, 2)  # four images, each active at another position
        >>> student = Features(torch.zeros(4, 8), (active,))
        >>> teacher = Features(torch.zeros(4, 8), (active.flip(0),))
        >>> ATLoss(beta=1.0)(student, teacher)
        {'loss': tensor(0.5000), 'loss_pair0': tensor(0.5000)}

    References:
        Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017 (arXiv:1612.03928).
        Original code: github.com/szagoruyko/attention-transfer.
    """

    name = "at"
    reads = "maps"
    embedding_as_map = False
    citation = Citation(
        authors="Zagoruyko, S. and Komodakis, N.",
        title="Paying More Attention to Attention",
        venue="ICLR",
        year=2017,
        arxiv="1612.03928",
    )

    def __init__(self, beta: float = 1000.0, p: float = 2.0):
        super().__init__()
        check_weights(beta=beta)
        if not 1 <= p < float("inf"):
            raise ValueError(
                f"p={p} must be a finite number >= 1: below, |x|^p has no finite slope where a map is zero."
            )
        self.beta = beta
        self.p = p

    def extra_repr(self) -> str:
        return f"beta={self.beta}, p={self.p}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        parts = {}
        for i, (s, t) in enumerate(pairs_of_maps(self.name, student, teacher)):
            with full_precision(s.device):
                s, t = match_size(s, t)
                parts[f"loss_pair{i}"] = (attention(s, self.p) - attention(t, self.p)).square().mean()
        return {"loss": self.beta * torch.stack(list(parts.values())).sum(), **parts}
