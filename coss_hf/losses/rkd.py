"""RKD: relations between the images of a batch, distances of pairs and angles of triples."""

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, full_precision, widen
from coss_hf.utils.distributed import all_gather, all_reduce_sum, rank, world_size

# Numbers in the largest tensor of a chunk of anchors: 128 MiB in float32.
CHUNK = 2**25


def _relations(anchors: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Distances ``(a, b)`` and cosines of angles ``(a, b, b)`` at ``anchors`` ``(a, d)`` between rows of ``x``.

    Rows equal to the anchor have no direction: cosine 0, and no gradient, where the literal derivative is about 1e12.
    """
    difference = x - anchors[:, None]
    squares = difference.square().sum(-1)
    zero = squares == 0
    # sqrt has an infinite slope at 0: keep it out of the graph.
    norm = torch.where(zero, 1.0, squares).sqrt().clamp_min(1e-12)
    direction = torch.where(zero[..., None], 0.0, difference / norm[..., None])
    return squares.clamp_min(1e-12).sqrt(), direction @ direction.mT


def _of_anchors(rows: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances ``(a, b)`` of student and teacher from the rows named, and the summed Huber error of the angles."""
    s_distance, s_cosine = _relations(s[rows], s)
    with torch.no_grad():
        t_distance, t_cosine = _relations(t[rows], t)
    other = rows[:, None] != torch.arange(len(s), device=s.device)
    angle = smooth_l1_loss(s_cosine, t_cosine, reduction="sum")
    return s_distance * other, t_distance * other, angle


class RKDLoss(nn.Module):
    """Relational distillation: distances between pairs and angles between triples of images.

    ``loss = beta * (distance_weight * loss_distance + angle_weight * loss_angle)`` with Huber's ``H`` (quadratic below
    1), ``loss_distance = mean_ij H(D^s_ij - D^t_ij)``, ``D_ij = |x_i - x_j|`` over its mean for ``i != j``, and
    ``loss_angle = mean_ijk H(A^s_ijk - A^t_ijk)``, ``A_ijk = <e_ij, e_ik>``, ``e_ij`` the unit vector of ``x_j - x_i``.

    The batch is that of all processes, each of which takes its share of the anchors ``i``: value and gradient equal
    those of one process, uneven shards too. Time is ``O(b^3 d)``. Anchors are worked on in chunks that are computed
    again in the backward pass, so memory stays at a few times 128 MiB.

    Args:
        beta: scale of the whole loss.
        distance_weight, angle_weight: of the two parts.

    Call with student and teacher ``Features``, whose embeddings may differ in dimension; ``index`` is not used.

    Raises:
        ValueError: a weight that is negative or not finite; a batch of one image.

    References:
        Park et al., Relational Knowledge Distillation, CVPR 2019 (arXiv:1904.05068). Original code:
        github.com/lenscloth/RKD.
    """

    uses_maps = False
    same_dim = False

    def __init__(self, beta: float = 1.0, distance_weight: float = 25.0, angle_weight: float = 50.0):
        super().__init__()
        check_weights(beta=beta, distance_weight=distance_weight, angle_weight=angle_weight)
        self.beta, self.distance_weight, self.angle_weight = beta, distance_weight, angle_weight

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = (all_gather(x) for x in widen(student.embedding.flatten(1), teacher.embedding.flatten(1)))
        b = len(s)
        if b < 2:
            raise ValueError("--method rkd compares images of a batch, which has one: set a larger batch size.")
        anchors = torch.arange(rank(), b, world_size(), device=s.device)
        chunks = anchors.split(max(1, CHUNK // (b * max(b, s.shape[1], t.shape[1]))))
        with full_precision(s.device):
            if len(chunks) == 1:
                parts = [_of_anchors(anchors, s, t)]
            else:
                parts = [
                    checkpoint(_of_anchors, rows, s, t, use_reentrant=False, preserve_rng_state=False)
                    for rows in chunks
                ]
            s_distance, t_distance = (torch.cat([part[i] for part in parts]) for i in (0, 1))
            total = all_reduce_sum(torch.stack([s_distance.sum(), t_distance.sum()])) / (b * (b - 1))
            distance = smooth_l1_loss(s_distance / total[0], t_distance / total[1].detach(), reduction="sum")
            angle = torch.stack([part[2] for part in parts]).sum()
            distance, angle = all_reduce_sum(torch.stack([distance, angle]))
            distance, angle = distance / b**2, angle / b**3
        loss = self.beta * (self.distance_weight * distance + self.angle_weight * angle)
        return {"loss": loss, "loss_distance": distance, "loss_angle": angle}
