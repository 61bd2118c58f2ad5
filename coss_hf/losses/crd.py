"""CRD: contrastive representation distillation."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_positive, check_weights, full_precision, whole_numbers, widen
from coss_hf.losses.memory_bank import products, uniform_rows, update_rows, weighted_sums
from coss_hf.utils.distributed import all_reduce_sum, rank, world_size
from coss_hf.utils.vectors import l2_normalize

EPS = 1e-7
MOST_NEGATIVES = 16_384


class CRDLoss(DistillationLoss):
    """Contrastive representation distillation: tell an image from others by its embedding in the other network.

    Negatives are drawn by image, since there are no labels. Both embeddings are projected to unit
    vectors ``v_s`` and ``v_t``. With ``E_s = exp(<M_t[i], v_s> / T)`` for the image itself and
    ``K`` others ``i``, ``p = E / Z`` and ``c = K / N``: ``loss_s = -mean_n [log p_n0 / (p_n0 + c +
    e) + sum_j log c / (p_nj + c + e)]``, and ``loss_t`` is the same for ``v_t`` against ``M_s``.
    ``loss = beta * (loss_s + loss_t)``. ``Z`` is ``N`` times the mean ``E`` of the first call.
    Afterwards, in training, ``M[y] <- normalize(m M[y] + (1 - m) v)`` for the images ``y`` of the
    batch.

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
        momentum: Weight ``m`` of the old row of a memory.
        feature_dim: Dimension of ``v_s`` and ``v_t``.

    Returns (when called): ``loss``; ``loss_s`` and ``loss_t`` without ``beta``.

    Raises:
        ValueError: More negatives than other images; an invalid weight or temperature.

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
        check_weights(beta=beta, momentum=momentum)
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
        self.register_buffer("Z", torch.zeros(2))  # of student and teacher; 0 until the first call

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
            e_s = (products(v_s, self.memory_t, candidates) / self.temperature).exp()
            e_t = (products(v_t, self.memory_s, candidates) / self.temperature).exp()
            self._set_constants(e_s, e_t)
            z_s, z_t = self.Z
            loss_s = self._contrast(e_s / z_s, v_s, self.memory_t, candidates)
            loss_t = self._contrast(e_t / z_t, v_t, self.memory_s, candidates)
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
    def _set_constants(self, e_s: Tensor, e_t: Tensor) -> None:
        """Set ``Z`` at the first call."""
        total = all_reduce_sum(torch.stack([e_s.sum(), e_t.sum(), e_s.new_full((), e_s.numel())]))
        first = len(self.memory_s) * total[:2] / total[2]
        self.Z.copy_(torch.where(self.Z > 0, self.Z, first))

    def _contrast(self, p: Tensor, v: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
        """Compute the loss of one network from ``p`` ``(b, 1 + K)``, with a gradient for ``v``."""
        c = (p.shape[1] - 1) / len(memory)
        with torch.no_grad():
            total = p + (c + EPS)
            value = -((p[:, 0] / total[:, 0]).log() + (c / total[:, 1:]).log().sum(1)).mean()
            # The gradient is taken here: the graph would have to keep what is read of the memory, which is written to.
            slope = p / total
            slope[:, 0] -= 1
            gradient = weighted_sums(slope / (len(p) * self.temperature), memory, candidates)
        return value + ((v - v.detach()) * gradient).sum()


class _Projection(nn.Module):
    """A linear layer whose outputs have length 1."""

    def __init__(self, dim: int, feature_dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return l2_normalize(self.linear(x.to(self.linear.weight.dtype)))
