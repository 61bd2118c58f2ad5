"""RKD: relations between the images of a batch, distances of pairs and angles of triples."""

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss
from torch.utils.checkpoint import checkpoint

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, widen
from coss_hf.utils.distributed import all_gather, all_reduce_sum, rank, world_size

# Numbers in the largest tensor of a chunk of anchors: 128 MiB in float32.
CHUNK = 2**25


def _relations(anchors: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute distances ``(a, b)`` and cosines of angles ``(a, b, b)`` at ``anchors`` ``(a, d)`` between rows of ``x``.

    Rows equal to the anchor have no direction: cosine 0, and no gradient, where the literal
    derivative is about 1e12.
    """
    difference = x - anchors[:, None]
    squares = difference.square().sum(-1)
    zero = squares == 0
    # sqrt has an infinite slope at 0: keep it out of the graph.
    norm = torch.where(zero, 1.0, squares).sqrt().clamp_min(1e-12)
    direction = torch.where(zero[..., None], 0.0, difference / norm[..., None])
    return squares.clamp_min(1e-12).sqrt(), direction @ direction.mT


def _of_anchors(rows: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the distances ``(a, b)`` of student and teacher from some rows, and the error of the angles.

    The error is the sum of Huber's errors over all pairs of other rows.
    """
    s_distance, s_cosine = _relations(s[rows], s)
    with torch.no_grad():
        t_distance, t_cosine = _relations(t[rows], t)
    other = rows[:, None] != torch.arange(len(s), device=s.device)
    angle = smooth_l1_loss(s_cosine, t_cosine, reduction="sum")
    return s_distance * other, t_distance * other, angle


class RKDLoss(DistillationLoss):
    """Relational distillation: match distances between pairs and angles between triples of images.

    ``loss = beta * (distance_weight * loss_distance + angle_weight * loss_angle)`` with Huber's
    ``H`` (quadratic below 1), ``loss_distance = mean_ij H(D^s_ij - D^t_ij)``,
    ``D_ij = |x_i - x_j|`` over its mean for ``i != j``, and
    ``loss_angle = mean_ijk H(A^s_ijk - A^t_ijk)``, ``A_ijk = <e_ij, e_ik>``, ``e_ij`` the unit
    vector of ``x_j - x_i``.

    Shapes: embeddings ``(b, d)``, flattened, whose dimensions may differ. Time is ``O(b^3 d)``.
    Anchors are worked on in chunks that are computed again in the backward pass, so memory stays at
    a few times 128 MiB.

    Several processes: the batch is that of all processes, each of which takes its share of the
    anchors ``i``. Value and gradient equal those of one process, for uneven shards, too.

    Use when: embeddings differ in dimension and no head is wanted, because only the geometry of a
    batch matters. For batches of up to some hundred images. The student's embeddings cannot be
    compared with the teacher's.

    Args:
        beta: Scale of the loss.
        distance_weight: Weight of ``loss_distance``.
        angle_weight: Weight of ``loss_angle``.

    Returns (when called): ``loss``; ``loss_distance`` and ``loss_angle`` without weights.

    Raises:
        ValueError: A weight that is negative or not finite; a batch of one image.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.rkd import RKDLoss
        >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
        >>> student = 2 * torch.cat([teacher, torch.ones(3, 1)], 1)  # scaled and moved, in another dimension
        >>> output = RKDLoss()(Features(student), Features(teacher))
        >>> {name: round(value.item(), 4) for name, value in output.items()}
        {'loss': 0.0, 'loss_distance': 0.0, 'loss_angle': 0.0}

    References:
        Park et al., Relational Knowledge Distillation, CVPR 2019 (arXiv:1904.05068). Original code:
        github.com/lenscloth/RKD.
    """

    name = "rkd"
    reads = "embedding"
    couples_images = True
    citation = Citation(
        authors="Park, W. and others",
        title="Relational Knowledge Distillation",
        venue="CVPR",
        year=2019,
        arxiv="1904.05068",
    )

    def __init__(self, beta: float = 1.0, distance_weight: float = 25.0, angle_weight: float = 50.0):
        super().__init__()
        check_weights(beta=beta, distance_weight=distance_weight, angle_weight=angle_weight)
        self.beta = beta
        self.distance_weight = distance_weight
        self.angle_weight = angle_weight

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = widen(student.embedding.flatten(1), teacher.embedding.flatten(1))
        s = all_gather(s)
        t = all_gather(t)
        b = len(s)
        if b < 2:
            raise ValueError("--method rkd compares images of a batch, which has one: set a larger batch size.")
        with full_precision(s.device):
            s_distance, t_distance, angle = _relations_of_this_process(s, t)
            total = all_reduce_sum(torch.stack([s_distance.sum(), t_distance.sum()])) / (b * (b - 1))
            distance = smooth_l1_loss(s_distance / total[0], t_distance / total[1].detach(), reduction="sum")
            distance, angle = all_reduce_sum(torch.stack([distance, angle]))
            distance = distance / b**2
            angle = angle / b**3
        loss = self.beta * (self.distance_weight * distance + self.angle_weight * angle)
        return {"loss": loss, "loss_distance": distance, "loss_angle": angle}


def _relations_of_this_process(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``_of_anchors`` with the anchors of this process, in chunks of bounded memory."""
    b = len(s)
    anchors = torch.arange(rank(), b, world_size(), device=s.device)
    chunks = anchors.split(max(1, CHUNK // (b * max(b, s.shape[1], t.shape[1]))))
    if len(chunks) == 1:
        parts = [_of_anchors(anchors, s, t)]
    else:
        parts = [checkpoint(_of_anchors, rows, s, t, use_reentrant=False, preserve_rng_state=False) for rows in chunks]
    s_distances, t_distances, angles = zip(*parts)
    return torch.cat(s_distances), torch.cat(t_distances), torch.stack(angles).sum()
