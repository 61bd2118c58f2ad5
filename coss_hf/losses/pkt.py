"""PKT: the probability that an image picks another of the batch as its neighbour."""

import torch
from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, full_precision, widen
from coss_hf.utils.distributed import all_gather

EPS = 1e-7


def _neighbor_probabilities(x: Tensor) -> Tensor:
    """``(b, b)``: each row's cosines to all rows, moved to 0..1 and divided by their sum.

    A row that is exactly zero has cosine 0 to all and gets no gradient, where the original's is NaN.
    """
    norm = x.norm(dim=1, keepdim=True)
    unit = torch.where(norm == 0, 0.0, x / (norm + EPS))
    kernel = (unit @ unit.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


class PKTLoss(nn.Module):
    """Probabilistic knowledge transfer: student and teacher agree on who is near whom in a batch.

    ``loss = beta * mean_ij P^t_ij log((P^t_ij + e) / (P^s_ij + e))`` with ``e = 1e-7`` and ``P_ij`` the shifted cosine
    ``(cos(x_i, x_j) + 1) / 2`` of ``(b, d)`` embeddings (flattened) over its sum for all ``j``. As in the original code
    the diagonal is kept and all ``b^2`` entries are averaged; the paper leaves ``i = j`` out and sums.

    The batch is that of all processes: value and gradient equal those of one process, uneven shards too.

    Args:
        beta: scale of the loss.

    Call with student and teacher ``Features``, whose embeddings may differ in dimension; ``index`` is not used.

    Raises:
        ValueError: a weight that is negative or not finite.

    References:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018
        (arXiv:1803.10837). Original code: github.com/passalis/probabilistic_kt.
    """

    uses_maps = False
    same_dim = False

    def __init__(self, beta: float = 30000.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = (all_gather(x) for x in widen(student.embedding.flatten(1), teacher.embedding.flatten(1)))
        with full_precision(s.device):
            p_s, p_t = _neighbor_probabilities(s), _neighbor_probabilities(t)
            return {"loss": self.beta * (p_t * ((p_t + EPS) / (p_s + EPS)).log()).mean()}
