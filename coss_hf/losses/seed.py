"""SEED: self-supervised distillation against a queue."""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from coss_hf.features import Features
from coss_hf.losses.common import check_positive, check_weights, embeddings_of_one_shape, full_precision, whole_numbers
from coss_hf.utils.distributed import all_gather
from coss_hf.utils.vectors import l2_normalize


class SEEDLoss(nn.Module):
    """SEED: student and teacher see the same similarities to a queue of teacher embeddings.

    With unit rows ``s``, ``t`` and the queue's unit columns ``Q`` ``(d, K)``, own teacher embedding first:
    ``l_s = [<s, t>, s Q] / t_student``, ``l_t = [<t, t>, t Q] / t_teacher`` and ``loss = -beta * mean_n sum_j
    softmax(l_t)_nj log softmax(l_s)_nj``. In training the oldest columns then become the batch's ``t``.

    Several processes: the queue takes the images of all, and is equal on each; the mean is over this process's images,
    exact where all have as many.

    Args:
        teacher_dim: ``d``.
        num_images: of the training set.
        batch_size: images of a forward pass over all processes.
        beta: scale of the loss.
        queue_size: ``K``; by default 65,536, or as many whole batches as a smaller training set has.
        student_temperature, teacher_temperature: 0.2 and 0.01 in the paper.

    Call with ``Features`` whose embeddings are ``(b, d)``. Returns ``loss``.

    Raises:
        ValueError: a queue larger than the training set or of no whole number of batches; embeddings that differ in
            shape; a weight or temperature that cannot be.

    References:
        Fang et al., SEED: Self-supervised Distillation For Visual Representation, ICLR 2021 (arXiv:2101.04731),
        equations 3 to 6. Code compared with: github.com/jacobswan1/SEED.
    """

    uses_maps = False
    same_dim = True

    def __init__(
        self,
        *,
        teacher_dim: int,
        num_images: int,
        batch_size: int,
        beta: float = 1.0,
        queue_size: int | None = None,
        student_temperature: float = 0.2,
        teacher_temperature: float = 0.01,
    ):
        super().__init__()
        check_weights(beta=beta)
        check_positive(student_temperature=student_temperature, teacher_temperature=teacher_temperature)
        largest = num_images // batch_size * batch_size
        queue_size = min(65_536 // batch_size * batch_size, largest) if queue_size is None else queue_size
        (queue_size,) = whole_numbers(queue_size=queue_size)
        if not 1 <= queue_size <= largest or queue_size % batch_size:
            raise ValueError(
                f"--method seed: queue_size={queue_size} must be a multiple of the batch of {batch_size} images and at "
                f"most {largest}, what {num_images} training images fill."
            )
        self.beta = beta
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.register_buffer("queue", normalize(torch.randn(teacher_dim, queue_size), dim=0))
        self.register_buffer("ptr", torch.zeros(1, dtype=torch.long))

    def extra_repr(self) -> str:
        return f"beta={self.beta}, queue_size={self.queue.shape[1]}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = embeddings_of_one_shape("seed", student, teacher)
        with full_precision(s.device):
            s, t = l2_normalize(s), l2_normalize(t)
            queue = self.queue.to(s.dtype, copy=True)  # the graph keeps what the update overwrites
            logits = [torch.cat([(x * t).sum(1, keepdim=True), x @ queue], 1) for x in (s, t)]
            target = (logits[1] / self.teacher_temperature).softmax(1)
            loss = -(target * (logits[0] / self.student_temperature).log_softmax(1)).sum(1).mean()
            if self.training:
                self._enqueue(t)
        return {"loss": self.beta * loss}

    @torch.no_grad()
    def _enqueue(self, t: Tensor) -> None:
        t, size = all_gather(t), self.queue.shape[1]
        columns = (self.ptr + torch.arange(len(t), device=t.device)) % size
        self.queue[:, columns] = t.T.to(self.queue.dtype)
        self.ptr.copy_((self.ptr + len(t)) % size)
