"""CRD: contrastive representation distillation."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from coss_hf.features import Features
from coss_hf.losses.common import check_positive, check_weights, full_precision, whole_numbers, widen
from coss_hf.losses.memory_bank import products, weighted
from coss_hf.utils.distributed import all_gather, all_reduce_sum, rank, world_size

EPS = 1e-7


class CRDLoss(nn.Module):
    """Contrastive representation distillation, negatives drawn by image since there are no labels.

    Both embeddings are projected to unit vectors ``v_s``, ``v_t``. With ``E_s = exp(<M_t[i], v_s> / T)`` for the image
    itself and ``K`` others ``i``, ``p = E / Z``, ``c = K / N``:
    ``loss_s = -mean_n [log p_n0 / (p_n0 + c + e) + sum_j log c / (p_nj + c + e)]``, the same for ``v_t`` against
    ``M_s``, and ``loss = beta * (loss_s + loss_t)``. ``Z`` is ``N`` times the mean ``E`` of the first call. Afterwards
    ``M[y] <- normalise(m M[y] + (1 - m) v)`` for the batch's images ``y``, in training.

    Several processes: memories and ``Z`` are those of all, equal on each; the mean is over this process's images, exact
    where all have as many.

    Args:
        student_dim, teacher_dim: of the embeddings.
        num_images: ``N``, of the training set.
        beta, temperature, momentum, feature_dim: scale, ``T``, ``m``, numbers of ``v``.
        negatives: ``K``; 16,384 by default, or all others of a smaller set.

    Call with ``Features`` and ``index`` ``(b,)``; ``candidates`` ``(b, 1 + K)`` instead of drawn ones, the image first.

    Raises:
        ValueError: more negatives than other images; a weight or temperature that cannot be.

    References: Tian et al., ICLR 2020 (arXiv:1910.10699). Code compared with: github.com/HobbitLong/RepDistiller, crd/.
    """

    uses_maps = False
    same_dim = False

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
        negatives = min(16_384, num_images - 1) if negatives is None else negatives
        negatives, feature_dim = whole_numbers(negatives=negatives, feature_dim=feature_dim)
        if not 1 <= negatives <= num_images - 1:
            raise ValueError(f"--method crd: negatives={negatives} must lie between 1 and the {num_images - 1} others.")
        self.beta, self.negatives, self.temperature, self.momentum = beta, negatives, temperature, momentum
        self.embed_s, self.embed_t = (_Projection(dim, feature_dim) for dim in (student_dim, teacher_dim))
        bound = (feature_dim / 3) ** -0.5
        for name in ("memory_s", "memory_t"):
            self.register_buffer(name, torch.empty(num_images, feature_dim).uniform_(-bound, bound))
        self.register_buffer("Z", torch.zeros(2))  # of student and teacher; 0 until the first call

    def extra_repr(self) -> str:
        return f"beta={self.beta}, negatives={self.negatives}, temperature={self.temperature}"

    def forward(
        self, student: Features, teacher: Features, index: Tensor, candidates: Tensor | None = None
    ) -> dict[str, Tensor]:
        s, t = widen(student.embedding.flatten(1), teacher.embedding.flatten(1))
        with full_precision(s.device):
            v_s, v_t = self.embed_s(s), self.embed_t(t)
            candidates = self.draw(index) if candidates is None else candidates
            pairs = (v_s, self.memory_t), (v_t, self.memory_s)
            e = [(products(*pair, candidates) / self.temperature).exp() for pair in pairs]
            self._set_constants(e)
            parts = [self._nce(x / z, *pair, candidates) for x, z, pair in zip(e, self.Z, pairs)]
            if self.training:
                self._update(v_s.detach(), v_t.detach(), index)
        return {"loss": self.beta * sum(parts), "loss_s": parts[0], "loss_t": parts[1]}

    def draw(self, index: Tensor) -> Tensor:
        """Candidates ``(b, 1 + K)``: each image, and others with replacement."""
        # As one process would for the batches of all: with one seed each would draw the same.
        shape = world_size(), len(index), self.negatives
        others = torch.randint(len(self.memory_s) - 1, shape, dtype=torch.int32, device=index.device)[rank()].long()
        others += others >= index[:, None]
        return torch.cat([index[:, None], others], 1)

    @torch.no_grad()
    def _set_constants(self, e: list[Tensor]) -> None:
        total = all_reduce_sum(torch.stack([*(x.sum() for x in e), e[0].new_full((), e[0].numel())]))
        first = len(self.memory_s) * total[:2] / total[2]
        self.Z.copy_(torch.where(self.Z > 0, self.Z, first))

    def _nce(self, p: Tensor, v: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
        c = (p.shape[1] - 1) / len(memory)
        with torch.no_grad():
            total = p + (c + EPS)
            value = -((p[:, 0] / total[:, 0]).log() + (c / total[:, 1:]).log().sum(1)).mean()
            # The gradient is taken here: the graph would have to keep what is read of the memory, which is written to.
            slope = p / total
            slope[:, 0] -= 1
            gradient = weighted(slope / (len(p) * self.temperature), memory, candidates)
        return value + ((v - v.detach()) * gradient).sum()

    @torch.no_grad()
    def _update(self, v_s: Tensor, v_t: Tensor, index: Tensor) -> None:
        index = all_gather(index)
        positions = torch.arange(len(index), device=index.device)
        # Of an image that is twice in a batch the last counts.
        last = index.new_zeros(len(self.memory_s)).scatter_reduce(0, index, positions, "amax")[index]
        for memory, v in ((self.memory_s, v_s), (self.memory_t, v_t)):
            v = all_gather(v)[last].to(memory.dtype)
            memory[index] = normalize(self.momentum * memory[index] + (1 - self.momentum) * v)


class _Projection(nn.Module):
    def __init__(self, dim: int, feature_dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, feature_dim)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.linear(x.to(self.linear.weight.dtype)), eps=1e-12)
