"""SP: similarity-preserving distillation."""

from torch import Tensor

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, pairs_of_maps, widen
from coss_hf.utils.distributed import all_gather
from coss_hf.utils.vectors import l2_normalize


class SPLoss(DistillationLoss):
    """Similarity-preserving: images that the teacher finds alike should be alike for the student.

    ``loss = beta / b^2 * sum_ij (G(T) - G(S))_ij^2``. ``G(X)`` is ``X X^T`` with rows of length 1,
    and ``X`` ``(b, D)`` is a map of every image, flattened, or the embedding where there are no
    maps. The loss is summed over the maps given; a run gives the last alone. To an image whose
    features are all zero, only the rows of others give a gradient.

    Shapes: maps ``(b, c, h, w)``, as many of the student as of the teacher, or embeddings
    ``(b, d)``; channels, sizes and dimensions may differ.

    Several processes: features are gathered, so ``b`` counts the images of all processes. Value and
    gradient equal those of one process, for uneven shards, too.

    Use when: the last maps differ in shape and only the similarities between images of a batch
    should agree. Needs large batches. The student's embeddings cannot be compared with the
    teacher's.

    Args:
        beta: Scale of the loss.

    Returns (when called): ``loss``.

    Raises:
        ValueError: A weight that is negative or not finite; numbers of maps that differ.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.sp import SPLoss
        >>> student = Features(torch.ones(2, 3))  # two images that are equal
        >>> teacher = Features(torch.eye(2, 5))  # two images that have nothing in common
        >>> round(SPLoss(beta=1.0)(student, teacher)["loss"].item(), 4)
        0.2929

    References:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019 (arXiv:1907.09682),
        equations 2 to 4. Original code: github.com/HobbitLong/RepDistiller, distiller_zoo/SP.py.
    """

    name = "sp"
    reads = "last_map"
    couples_images = True
    citation = Citation(
        authors="Tung, F. and Mori, G.",
        title="Similarity-Preserving Knowledge Distillation",
        venue="ICCV",
        year=2019,
        arxiv="1907.09682",
    )

    def __init__(self, beta: float = 3000.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        if student.maps or teacher.maps:
            pairs = pairs_of_maps(self.name, student, teacher)
        else:
            pairs = [widen(student.embedding, teacher.embedding)]
        with full_precision(student.embedding.device):
            return {"loss": self.beta * sum(_difference(s, t) for s, t in pairs)}


def _difference(s: Tensor, t: Tensor) -> Tensor:
    s = all_gather(s.flatten(1))
    t = all_gather(t.flatten(1))
    return (l2_normalize(t @ t.T) - l2_normalize(s @ s.T)).square().mean()
