"""SEED: self-supervised distillation against a queue."""

import math

import torch
from torch import Tensor

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import (
    FullPrecisionBuffers,
    check_positive,
    check_weights,
    embeddings_of_one_shape,
    full_precision,
    whole_numbers,
)
from coss_hf.losses.memory_bank import enqueue, random_queue
from coss_hf.utils.vectors import l2_normalize

LARGEST_QUEUE = 65_536


class SEEDLoss(FullPrecisionBuffers, DistillationLoss):
    """SEED: student and teacher see the same similarities to a queue of teacher embeddings.

    With unit rows ``s``, ``t`` and the queue's unit columns ``Q`` ``(d, K)``, own teacher embedding
    first: ``l_s = [<s, t>, s Q] / t_student``, ``l_t = [<t, t>, t Q] / t_teacher`` and
    ``loss = -beta * mean_n sum_j softmax(l_t)_nj log softmax(l_s)_nj``. In training the oldest
    columns then become the ``t`` of the batch.

    Shapes: embeddings ``(b, d)`` of both networks.

    Several processes: the queue takes the images of all processes, and is equal on each. The loss
    is the mean over the images of this process, which is exact where all have as many.

    Use when: the teacher is self-supervised (MoCo, DINO), the training set is large, and batches
    are too small to be compared within. ``seed + coss(lambda_co=0)`` adds space similarity, as in
    the CoSS paper.

    Args:
        teacher_dim: Dimension ``d`` of the embeddings.
        num_images: Number of images in the training set; None for a stream.
        batch_size: Number of images of a forward pass over all processes.
        beta: Scale of the loss.
        queue_size: Length ``K`` of the queue; by default 65,536, or as many full batches as a
            smaller training set has; a stream counts as a large one.
        student_temperature: Temperature of the student; 0.2 in the paper.
        teacher_temperature: Temperature of the teacher; 0.01 in the paper.

    Returns (when called): ``loss``.

    Raises:
        ValueError: A queue larger than the training set, or of no whole number of batches;
            embeddings that differ in shape; an invalid weight or temperature.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.seed import SEEDLoss
        >>> loss = SEEDLoss(teacher_dim=3, num_images=10, batch_size=2)
        >>> loss.queue.shape
        torch.Size([3, 10])
        >>> embeddings = Features(torch.eye(2, 3))
        >>> output = loss(embeddings, embeddings)
        >>> loss.queue[:, :2].T  # the newest images
        tensor([[1., 0., 0.],
                [0., 1., 0.]])

    References:
        Fang et al., SEED: Self-supervised Distillation For Visual Representation, ICLR 2021
        (arXiv:2101.04731), equations 3 to 6. Code compared with: github.com/jacobswan1/SEED.
    """

    name = "seed"
    reads = "embedding"
    same_dim = True
    keeps_state = True
    citation = Citation(
        authors="Fang, Z. and others",
        title="SEED: Self-supervised Distillation For Visual Representation",
        venue="ICLR",
        year=2021,
        arxiv="2101.04731",
    )

    def __init__(
        self,
        *,
        teacher_dim: int,
        num_images: int | None,
        batch_size: int,
        beta: float = 1.0,
        queue_size: int | None = None,
        student_temperature: float = 0.2,
        teacher_temperature: float = 0.01,
    ):
        super().__init__()
        check_weights(beta=beta)
        check_positive(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        largest = math.inf if num_images is None else num_images // batch_size * batch_size
        if queue_size is None:
            queue_size = min(LARGEST_QUEUE // batch_size * batch_size, largest)
        (queue_size,) = whole_numbers(queue_size=queue_size)
        if not 1 <= queue_size <= largest or queue_size % batch_size:
            most = "" if num_images is None else f" and at most {largest}, what {num_images} training images fill"
            raise ValueError(
                f"--method seed: queue_size={queue_size} must be a multiple of the batch of {batch_size} images{most}."
            )
        self.beta = beta
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.register_buffer("queue", random_queue(teacher_dim, queue_size))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, queue_size={self.queue.shape[1]}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = embeddings_of_one_shape(self.name, student, teacher)
        with full_precision(s.device):
            s = l2_normalize(s)
            t = l2_normalize(t)
            queue = self.queue.to(s.dtype, copy=True)  # the graph keeps what the update overwrites
            student_logits = _similarities(s, t, queue) / self.student_temperature
            teacher_logits = _similarities(t, t, queue) / self.teacher_temperature
            loss = -(teacher_logits.softmax(1) * student_logits.log_softmax(1)).sum(1).mean()
            if self.training:
                enqueue(self.queue, self.ptr, t)
        return {"loss": self.beta * loss}


def _similarities(x: Tensor, t: Tensor, queue: Tensor) -> Tensor:
    """Compute ``(b, 1 + K)``: the products of rows with the rows of ``t``, then with all columns of the queue."""
    return torch.cat([(x * t).sum(1, keepdim=True), x @ queue], 1)
