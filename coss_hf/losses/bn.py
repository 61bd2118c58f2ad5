"""The paper's variant with batch norm."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, embeddings_of_one_shape, full_precision
from coss_hf.utils.distributed import all_reduce_sum, world_size

EPS, MOMENTUM = 1e-5, 0.1


class BNLoss(nn.Module):
    """Squared error between the batch-normalised student embedding and the teacher's embedding as it is.

    ``loss = beta * mean (gamma_j (S_ij - mu_j) / sqrt(var_j + 1e-5) + delta_j - T_ij)^2`` over the ``b`` images and
    ``d`` dimensions, with mean and biased variance of the batch and a learnt ``gamma`` (``weight``) and ``delta``
    (``bias``). In evaluation the running mean and variance (momentum 0.1, the variance unbiased) take their place.

    The batch is that of all processes: value and gradient equal those of one process, uneven shards too.

    Args:
        teacher_dim: ``d``.
        beta: scale of the loss; the paper names none, and this is that of CoSS, which the variant replaces.

    Call with ``Features`` whose embeddings are ``(b, d)``. Returns ``loss``.

    Raises:
        ValueError: a weight that is negative or not finite; embeddings that differ in shape; a batch of one image.

    References:
        Singh and Wang, ECCV 2024 (arXiv:2409.13939), supplementary document, Table 4.
    """

    uses_maps = False
    same_dim = True

    def __init__(self, *, teacher_dim: int, beta: float = 50.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta
        self.weight, self.bias = nn.Parameter(torch.ones(teacher_dim)), nn.Parameter(torch.zeros(teacher_dim))
        self.register_buffer("running_mean", torch.zeros(teacher_dim))
        self.register_buffer("running_var", torch.ones(teacher_dim))

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = embeddings_of_one_shape("bn", student, teacher)
        if self.training and len(s) * world_size() < 2:
            raise ValueError("--method bn takes statistics over a batch, and this is one image; use a larger batch.")
        with full_precision(s.device):
            count = all_reduce_sum(s.new_full((), len(s)))
            if self.training:
                mean = all_reduce_sum(s.sum(0)) / count
                # Two passes: a variance from sums of squares loses its digits where the mean is large.
                variance = all_reduce_sum((s - mean).square().sum(0)) / count
                self._remember(mean.detach(), variance.detach(), count.detach())
            else:
                mean, variance = self.running_mean, self.running_var
            error = (self.weight * (s - mean) / (variance + EPS).sqrt() + self.bias - t).square()
            return {"loss": self.beta * all_reduce_sum(error.sum()) / (count * s.shape[1])}

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
        unbiased = variance * count / (count - 1).clamp_min(1)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), MOMENTUM)
