"""CRD: contrastive representation distillation."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import (
    FullPrecisionBuffers,
    check_positive,
    check_shares,
    check_weights,
    full_precision,
    whole_numbers,
    wide,
    widen,
)
from coss_hf.losses.memory_bank import products, uniform_rows, update_rows, weighted_sums
from coss_hf.utils.distributed import all_reduce_sum, rank, world_size
from coss_hf.utils.vectors import l2_normalize

EPS = 1e-7
MOST_NEGATIVES = 16_384
NOT_SET = torch.finfo(torch.float32).min  # the logarithm of 0, as a number that checkpoints may hold


class CRDLoss(FullPrecisionBuffers, DistillationLoss):
    """Contrastive representation distillation: tell an image from others by its embedding in the other network.

    Negatives are drawn by image, since there are no labels. Both embeddings are projected to unit
    vectors ``v_s`` and ``v_t``. With ``E_s = exp(<M_t[i], v_s> / T)`` for the image itself and
    ``K`` others ``i``, ``p = E / Z`` and ``c = K / N``: ``loss_s = -mean_n [log p_n0 / (p_n0 + c +
    e) + sum_j log c / (p_nj + c + e)]``, and ``loss_t`` is the same for ``v_t`` against ``M_s``.
    ``loss = beta * (loss_s + loss_t)``. ``Z`` is ``N`` times the mean ``E`` of the first call.
    Afterwards, in training, ``M[y] <- normalize(m M[y] + (1 - m) v)`` for the images ``y`` of the
    batch. ``E``, ``p`` and ``Z`` are kept as logarithms: at a small ``T`` they leave the range of
    float32.

    Shapes: embeddings ``(b, d)``, whose dimensions may differ, and ``index`` ``(b,)``. A call may
    give ``candidates`` ``(b, 1 + K)``, the image itself first, instead of drawn ones.

    Several processes: memories and ``Z`` are those of all processes and equal on each. The loss is
    the mean over the images of this process, which is exact where all have as many.

    Use when: images should be told apart from many others at small batches. It holds two memories
    of ``N`` vectors, and needs several epochs, since an image's row is updated once per epoch.

    Args:
        student_dim: Dimension of the student's embedding.
        teacher_dim: Dimension of the teacher's embedding.
        num_images: Number ``N`` of images in the training set.
        beta: Scale of the loss.
        negatives: Number ``K`` of other images; by default 16,384, or all others of a smaller
            training set.
        temperature: Temperature ``T``.
        momentum: Weight ``m`` of the old row of a memory, from 0 to 1.
        feature_dim: Dimension of ``v_s`` and ``v_t``.

    Returns (when called): ``loss``; ``loss_s`` and ``loss_t`` without ``beta``.

    Raises:
        ValueError: More negatives than other images; an invalid weight, temperature or momentum.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.crd import CRDLoss
        >>> loss = CRDLoss(student_dim=3, teacher_dim=4, num_images=10, negatives=5)
        >>> output = loss(Features(torch.ones(2, 3)), Features(torch.ones(2, 4)), torch.tensor([7, 2]))
        >>> list(output)
        ['loss', 'loss_s', 'loss_t']
        >>> loss.memory_s.shape  # one row for each image; rows 7 and 2 have been updated
        torch.Size([10, 128])

    References:
        Tian et al., Contrastive Representation Distillation, ICLR 2020 (arXiv:1910.10699). Code
        compared with: github.com/HobbitLong/RepDistiller, crd/.
    """

    name = "crd"
    reads = "embedding"
    keeps_state = True
    needs_image_rows = True
    citation = Citation(
        authors="Tian, Y. and Krishnan, D. and Isola, P.",
        title="Contrastive Representation Distillation",
        venue="ICLR",
        year=2020,
        arxiv="1910.10699",
    )

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        num_images: int,
        beta: float = 0.8,
        negatives: int | None = None,
        temperature: float = 0.07,
        momentum: float = 0.5,
        feature_dim: int = 128,
    ):
        super().__init__()
        check_weights(beta=beta)
        check_shares(momentum=momentum)
        check_positive(temperature=temperature, feature_dim=feature_dim)
        if negatives is None:
            negatives = min(MOST_NEGATIVES, num_images - 1)
        negatives, feature_dim = whole_numbers(negatives=negatives, feature_dim=feature_dim)
        if not 1 <= negatives <= num_images - 1:
            raise ValueError(f"--method crd: negatives={negatives} must lie between 1 and the {num_images - 1} others.")
        self.beta = beta
        self.negatives = negatives
        self.temperature = temperature
        self.momentum = momentum
        self.embed_s = _Projection(student_dim, feature_dim)
        self.embed_t = _Projection(teacher_dim, feature_dim)
        self.register_buffer("memory_s", uniform_rows(num_images, feature_dim))
        self.register_buffer("memory_t", uniform_rows(num_images, feature_dim))
        self.register_buffer("log_Z", torch.full((2,), NOT_SET))  # of student and teacher

    @property
    def Z(self) -> Tensor:
        """Constants ``Z`` of student and teacher, ``(2,)``; 0 until the first call."""
        return self.log_Z.exp()

    def extra_repr(self) -> str:
        return f"beta={self.beta}, negatives={self.negatives}, temperature={self.temperature}"

    def forward(
        self, student: Features, teacher: Features, index: Tensor, candidates: Tensor | None = None
    ) -> dict[str, Tensor]:
        s, t = widen(student.embedding.flatten(1), teacher.embedding.flatten(1))
        with full_precision(s.device):
            v_s = self.embed_s(s)
            v_t = self.embed_t(t)
            if candidates is None:
                candidates = self.draw(index)
            log_e_s = products(v_s, self.memory_t, candidates) / self.temperature
            log_e_t = products(v_t, self.memory_s, candidates) / self.temperature
            self._set_constants(log_e_s, log_e_t)
            log_z_s, log_z_t = self.log_Z
            loss_s = self._contrast(log_e_s - log_z_s, v_s, self.memory_t, candidates)
            loss_t = self._contrast(log_e_t - log_z_t, v_t, self.memory_s, candidates)
            if self.training:
                updates = [(self.memory_s, v_s.detach()), (self.memory_t, v_t.detach())]
                update_rows(updates, index, self.momentum)
        return {"loss": self.beta * (loss_s + loss_t), "loss_s": loss_s, "loss_t": loss_t}

    def draw(self, index: Tensor) -> Tensor:
        """Draw candidates ``(b, 1 + K)``: each image itself, and others with replacement."""
        # As one process would for the batches of all: with one seed each would draw the same.
        shape = (world_size(), len(index), self.negatives)
        others = torch.randint(len(self.memory_s) - 1, shape, dtype=torch.int32, device=index.device)[rank()].long()
        others += others >= index[:, None]
        return torch.cat([index[:, None], others], 1)

    @torch.no_grad()
    def _set_constants(self, log_e_s: Tensor, log_e_t: Tensor) -> None:
        """Set ``Z`` at the first call."""
        count = log_e_s.new_full((), log_e_s.numel())
        sums = log_e_s.new_zeros(world_size(), 3)
        sums[rank()] = torch.stack([log_e_s.flatten().logsumexp(0), log_e_t.flatten().logsumexp(0), count.log()])
        total = all_reduce_sum(sums).logsumexp(0)
        first = math.log(len(self.memory_s)) + total[:2] - total[2]
        self.log_Z.copy_(torch.where(self.log_Z > NOT_SET, self.log_Z, first))

    def _contrast(self, log_p: Tensor, v: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
        """Compute the loss of one network from the logarithm of ``p`` ``(b, 1 + K)``, with a gradient for ``v``."""
        c = (log_p.shape[1] - 1) / len(memory)
        with torch.no_grad():
            # Of a = log(p / (c + e)), p / (p + c + e) is the sigmoid, and (c + e) / (p + c + e) that of -a.
            a = log_p - math.log(c + EPS)
            others = logsigmoid(-a[:, 1:]) + math.log(c / (c + EPS))
            value = -(logsigmoid(a[:, 0]) + others.sum(1)).mean()
            # The gradient is taken here: the graph would have to keep what is read of the memory, which is written to.
            slope = torch.cat([-(-a[:, :1]).sigmoid(), a[:, 1:].sigmoid()], 1)
            gradient = weighted_sums(slope / (len(slope) * self.temperature), memory, candidates)
        return value + ((v - v.detach()) * gradient).sum()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        # Checkpoints of earlier versions hold Z itself.
        constants = state_dict.pop(f"{prefix}Z", None)
        if constants is not None:
            state_dict[f"{prefix}log_Z"] = constants.log().clamp(min=NOT_SET)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Projection(nn.Module):
    """A linear layer whose outputs have length 1."""

    def __init__(self, dim: int, feature_dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return l2_normalize(wide(self.linear(x.to(self.linear.weight.dtype))))
