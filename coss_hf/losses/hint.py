"""FitNets: hints from the middle of the teacher."""

from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, match_size, pairs_of_maps, widen


def _convolution(student_dim: int, teacher_dim: int, student_size: int, teacher_size: int) -> nn.Module:
    """Build the convolution from the student's map to the teacher's, by the sides of the two."""
    if student_size == 2 * teacher_size:
        return nn.Conv2d(student_dim, teacher_dim, 3, stride=2, padding=1)
    if 2 * student_size == teacher_size:
        return nn.ConvTranspose2d(student_dim, teacher_dim, 4, stride=2, padding=1)
    return nn.Conv2d(student_dim, teacher_dim, 1 + max(0, student_size - teacher_size))


class HintLoss(DistillationLoss):
    """FitNets' hint: a regressor predicts the teacher's middle map from the student's.

    ``loss = beta * mean (r(S) - T)^2`` over images and all entries (the paper: half the squared
    norm). The regressor ``r`` is a convolution, batch norm and ReLU. The convolution is 3x3 of
    stride 2 where the student's map has twice the side, a transposed 4x4 of stride 2 where it has
    half, else one of kernel ``1 + h_s - h_t`` without padding (for a smaller student map: 1x1, and
    the teacher's map is averaged down). Where the networks give no maps, ``r`` is ``ReLU(W s + b)``
    of the embeddings.

    Shapes: maps ``(b, c, h, w)``, as many of the student as of the teacher. Of ``n`` pairs that
    with index ``n // 2`` is compared; its channels and sizes may differ.

    Several processes: the loss is the mean over the images of this process, which is exact where
    all have as many; the statistics of batch norm are per process unless ``--sync_batch_norm`` is
    given.

    Use when: a deep, thin student is hard to train, as a first stage or added to a method of
    embeddings (``hint(beta=1) + coss``). On its own it trains only the lower half of the student.

    Args:
        student_dim: Channels of the student's middle map, or dimension of its embedding.
        teacher_dim: Channels of the teacher's middle map, or dimension of its embedding.
        student_size: Side of the student's middle map; None for embeddings.
        teacher_size: Side of the teacher's middle map; None for embeddings.
        beta: Scale of the loss.
        regressor: ``auto`` as above, or ``none`` where the shapes agree.

    Returns (when called): ``loss``.

    Raises:
        ValueError: A weight that is negative or not finite; an unknown regressor, or none for
            shapes that differ.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.hint import HintLoss
        >>> loss = HintLoss(student_dim=3, teacher_dim=4, student_size=8, teacher_size=4)
        >>> student = Features(torch.zeros(2, 3), (torch.ones(2, 3, 8, 8),))
        >>> teacher = Features(torch.zeros(2, 4), (torch.ones(2, 4, 4, 4),))
        >>> loss(student, teacher)["loss"].shape
        torch.Size([])
        >>> loss.conv.stride
        (2, 2)

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015 (arXiv:1412.6550), equation 3.
        Code compared with: github.com/HobbitLong/RepDistiller, distiller_zoo/FitNet.py.
    """

    name = "hint"
    reads = "middle_map"
    citation = Citation(
        authors="Romero, A. and others",
        title="FitNets: Hints for Thin Deep Nets",
        venue="ICLR",
        year=2015,
        arxiv="1412.6550",
    )

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        student_size: int | None = None,
        teacher_size: int | None = None,
        beta: float = 100.0,
        regressor: str = "auto",
    ):
        super().__init__()
        check_weights(beta=beta)
        student_shape = (student_dim, student_size)
        teacher_shape = (teacher_dim, teacher_size)
        if regressor not in ("auto", "none") or (regressor == "none" and student_shape != teacher_shape):
            raise ValueError(
                f"--method hint: regressor={regressor!r} for a student's map of {student_shape} channels and side and "
                f"a teacher's of {teacher_shape}; use auto (or none, where they agree)."
            )
        self.beta = beta
        self.conv = None
        self.bn = None
        self.linear = None
        if regressor == "auto" and student_size is None:
            self.linear = nn.Linear(student_dim, teacher_dim)
        elif regressor == "auto":
            self.conv = _convolution(student_dim, teacher_dim, student_size, teacher_size)
            self.bn = nn.BatchNorm2d(teacher_dim)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        if student.maps:
            pairs = pairs_of_maps(self.name, student, teacher)
            s, t = pairs[len(pairs) // 2]
        else:
            s, t = widen(student.embedding, teacher.embedding)
        with full_precision(s.device):
            if self.linear is not None:
                s = self.linear(s.to(self.linear.weight.dtype)).relu()
            elif self.conv is not None:
                s = self.bn(self.conv(s.to(self.conv.weight.dtype))).relu()
            s, t = widen(s, t)
            if s.dim() == 4:
                s, t = match_size(s, t)
            return {"loss": self.beta * (s - t).square().mean()}
