"""SP: similarity-preserving distillation."""

from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, full_precision, pairs_of_maps, widen
from coss_hf.utils.distributed import all_gather
from coss_hf.utils.vectors import l2_normalize


class SPLoss(nn.Module):
    """Similarity-preserving: images that the teacher finds alike should be alike for the student.

    ``loss = beta / b^2 * sum_ij (G(T) - G(S))_ij^2``: ``G(X)`` is ``X X^T`` with rows at unit length, ``X`` ``(b, D)``
    a map of every image, flattened, or the embedding where there are no maps; summed over the maps given, of which a
    run gives the last alone. Dimensions may differ.

    Several processes: features are gathered, so ``b`` counts the images of all, and value and gradient are those of one
    process, uneven shards too.

    Args:
        beta: scale of the whole loss.

    Call with ``Features``. Returns ``loss``. To an image whose features are all zero, only the rows of others give a
    gradient.

    Raises:
        ValueError: a weight that is negative or not finite; numbers of maps that differ.

    References:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019 (arXiv:1907.09682), equations 2 to 4.
        Original code: github.com/HobbitLong/RepDistiller, distiller_zoo/SP.py.
    """

    uses_maps = True
    same_dim = False

    def __init__(self, beta: float = 3000.0):
        super().__init__()
        check_weights(beta=beta)
        self.beta = beta

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        if student.maps or teacher.maps:
            pairs = pairs_of_maps("sp", student, teacher)
        else:
            pairs = [widen(student.embedding, teacher.embedding)]
        with full_precision(student.embedding.device):
            return {"loss": self.beta * sum(_difference(s, t) for s, t in pairs)}


def _difference(s: Tensor, t: Tensor) -> Tensor:
    s, t = (all_gather(x.flatten(1)) for x in (s, t))
    return (l2_normalize(t @ t.T) - l2_normalize(s @ s.T)).square().mean()
