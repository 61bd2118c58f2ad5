"""BN: the CoSS paper's variant with batch norm."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.base import DistillationLoss
from coss_hf.losses.common import FullPrecisionBuffers, check_weights, embeddings_of_one_shape, full_precision
from coss_hf.losses.coss import CoSSLoss
from coss_hf.utils.distributed import all_reduce_sum, world_size

EPS = 1e-5
MOMENTUM = 0.1


class BNLoss(FullPrecisionBuffers, DistillationLoss):
    """Squared error between the batch-normalised embedding of the student and the embedding of the teacher as it is.

    ``loss = beta * mean (gamma_j (S_ij - mu_j) / sqrt(var_j + 1e-5) + delta_j - T_ij)^2``. The mean
    is over the ``b`` images and ``d`` dimensions, ``mu`` and ``var`` are the mean and the biased
    variance of the batch, ``gamma`` (``weight``) and ``delta`` (``bias``) are learnt. In evaluation
    the running mean and variance (momentum 0.1, the variance unbiased) take the place of those of
    the batch.

    Shapes: embeddings ``(b, d)`` of both networks.

    Several processes: the batch is that of all processes. Value and gradient equal those of one
    process, for uneven shards, too.

    Use when: the student should give the teacher's embeddings with their lengths, not only their
    directions, or as the baseline of Table 4 of the CoSS paper.

    Args:
        teacher_dim: Dimension ``d`` of the embeddings.
        beta: Scale of the loss. The paper names none; this is that of CoSS, which the variant
            replaces.

    Returns (when called): ``loss``.

    Raises:
        ValueError: A weight that is negative or not finite; embeddings that differ in shape; a
            batch of one image.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.bn import BNLoss
        >>> loss = BNLoss(teacher_dim=1, beta=1.0)
        >>> student = Features(torch.tensor([[10.0], [30.0]]))  # normalised: -1 and 1
        >>> teacher = Features(torch.tensor([[-1.0], [2.0]]))
        >>> round(loss(student, teacher)["loss"].item(), 4)
        0.5

    References:
        Singh and Wang, Simple Unsupervised Knowledge Distillation With Space Similarity, ECCV 2024
        (arXiv:2409.13939), supplementary document, Table 4.
    """

    name = "bn"
    reads = "embedding"
    couples_images = True
    same_dim = True
    citation = CoSSLoss.citation

    def __init__(self, *, teacher_dim: int, beta: float = 50.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta
        self.weight = nn.Parameter(torch.ones(teacher_dim))
        self.bias = nn.Parameter(torch.zeros(teacher_dim))
        self.register_buffer("running_mean", torch.zeros(teacher_dim))
        self.register_buffer("running_var", torch.ones(teacher_dim))

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = embeddings_of_one_shape(self.name, student, teacher)
        if self.training and len(s) * world_size() < 2:
            raise ValueError("--method bn takes statistics over a batch, and this is one image; use a larger batch.")
        with full_precision(s.device):
            count = all_reduce_sum(s.new_full((), len(s)))
            if self.training:
                mean = all_reduce_sum(s.sum(0)) / count
                # Two passes: a variance from sums of squares loses its digits where the mean is large.
                variance = all_reduce_sum((s - mean).square().sum(0)) / count
                self._update_running_statistics(mean.detach(), variance.detach(), count.detach())
            else:
                mean = self.running_mean
                variance = self.running_var
            error = (self.weight * (s - mean) / (variance + EPS).sqrt() + self.bias - t).square()
            return {"loss": self.beta * all_reduce_sum(error.sum()) / (count * s.shape[1])}

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), MOMENTUM)
