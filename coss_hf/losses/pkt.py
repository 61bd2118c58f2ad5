"""PKT: the probability that an image picks another of the batch as its neighbour."""

import torch
from torch import Tensor

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, widen
from coss_hf.utils.distributed import all_gather

EPS = 1e-7


def _neighbor_probabilities(x: Tensor) -> Tensor:
    """Compute ``(b, b)``: the cosines of each row to all rows, shifted to 0..1 and divided by their sum.

    A row that is exactly zero has cosine 0 to all and gets no gradient, where the original's is
    NaN.
    """
    norm = x.norm(dim=1, keepdim=True)
    directions = torch.where(norm == 0, 0.0, x / (norm + EPS))
    kernel = (directions @ directions.T + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


class PKTLoss(DistillationLoss):
    """Probabilistic knowledge transfer: student and teacher agree on who is near whom in a batch.

    ``loss = beta * mean_ij P^t_ij log((P^t_ij + e) / (P^s_ij + e))`` with ``e = 1e-7`` and ``P_ij``
    the shifted cosine ``(cos(x_i, x_j) + 1) / 2`` over its sum for all ``j``. As in the original
    code the diagonal is kept and all ``b^2`` entries are averaged; the paper leaves ``i = j`` out
    and sums.

    Shapes: embeddings ``(b, d)``, flattened, whose dimensions may differ.

    Several processes: the batch is that of all processes. Value and gradient equal those of one
    process, for uneven shards, too.

    Use when: embeddings differ in dimension and no head is wanted, because only the neighbourhoods
    matter (retrieval, k-NN). Needs large batches. The student's embeddings cannot be compared with
    the teacher's.

    Args:
        beta: Scale of the loss.

    Returns (when called): ``loss``.

    Raises:
        ValueError: A weight that is negative or not finite.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.pkt import PKTLoss
        >>> student = Features(torch.eye(3, 2))
        >>> teacher = Features(5 * torch.eye(3, 4))  # longer, and the third image has a direction of its own
        >>> bool(PKTLoss()(student, teacher)["loss"] > 0)
        True
        >>> PKTLoss()(teacher, teacher)["loss"]
        tensor(0.)

    References:
        Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer,
        ECCV 2018 (arXiv:1803.10837). Original code: github.com/passalis/probabilistic_kt.
    """

    name = "pkt"
    reads = "embedding"
    couples_images = True
    citation = Citation(
        authors="Passalis, N. and Tefas, A.",
        title="Learning Deep Representations with Probabilistic Knowledge Transfer",
        venue="ECCV",
        year=2018,
        arxiv="1803.10837",
    )

    def __init__(self, beta: float = 30000.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = widen(student.embedding.flatten(1), teacher.embedding.flatten(1))
        s = all_gather(s)
        t = all_gather(t)
        with full_precision(s.device):
            p_s = _neighbor_probabilities(s)
            p_t = _neighbor_probabilities(t)
            return {"loss": self.beta * (p_t * ((p_t + EPS) / (p_s + EPS)).log()).mean()}
