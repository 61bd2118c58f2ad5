"""FitNets: hints from the middle of the teacher."""

from torch import Tensor, nn

from coss_hf.features import Features
from coss_hf.losses.common import check_weights, full_precision, match_size, pairs_of_maps, widen


class HintLoss(nn.Module):
    """FitNets' hint: a regressor makes the teacher's middle map of the student's.

    ``loss = beta * mean (r(S) - T)^2`` over images and all entries (the paper: half the squared norm). ``r`` is a
    convolution, batch norm and ReLU: 3x3 of stride 2 where the student's map has twice the side, a transposed 4x4 of
    stride 2 where it has half, else one of kernel ``1 + h_s - h_t`` without padding (a smaller student map: 1x1, the
    teacher's averaged down). Where the networks give no maps, ``ReLU(W s + b)`` of the embeddings.

    Of n pairs of maps that with index n // 2 is compared. Several processes: the mean over the images of this one,
    exact where all have as many; batch norm's statistics are per process unless ``--sync_batch_norm`` is given.

    Args:
        student_dim, teacher_dim: channels of the middle maps, or dimensions of the embeddings.
        student_size, teacher_size: sides of the middle maps; None for embeddings.
        beta: scale of the loss.
        regressor: ``auto`` as above, or ``none`` where the shapes agree.

    Call with ``Features``. Returns ``loss``.

    Raises:
        ValueError: a weight that is negative or not finite; an unknown regressor, or none for shapes that differ.

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015 (arXiv:1412.6550), equation 3. Code compared with:
        github.com/HobbitLong/RepDistiller, distiller_zoo/FitNet.py.
    """

    uses_maps = True
    same_dim = False

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
        shapes = (student_dim, student_size), (teacher_dim, teacher_size)
        if regressor not in ("auto", "none") or (regressor == "none" and shapes[0] != shapes[1]):
            raise ValueError(
                f"--method hint: regressor={regressor!r} for a student's map of {shapes[0]} channels and side and a "
                f"teacher's of {shapes[1]}; use auto (or none, where they agree)."
            )
        self.beta, self.conv, self.bn, self.linear = beta, None, None, None
        if regressor == "auto" and student_size is None:
            self.linear = nn.Linear(student_dim, teacher_dim)
        elif regressor == "auto":
            if student_size == 2 * teacher_size:
                self.conv = nn.Conv2d(student_dim, teacher_dim, 3, stride=2, padding=1)
            elif 2 * student_size == teacher_size:
                self.conv = nn.ConvTranspose2d(student_dim, teacher_dim, 4, stride=2, padding=1)
            else:
                self.conv = nn.Conv2d(student_dim, teacher_dim, 1 + max(0, student_size - teacher_size))
            self.bn = nn.BatchNorm2d(teacher_dim)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        if student.maps:
            pairs = pairs_of_maps("hint", student, teacher)
            s, t = pairs[len(pairs) // 2]
        else:
            s, t = widen(student.embedding, teacher.embedding)
        with full_precision(s.device):
            if self.linear is not None:
                s = self.linear(s.to(self.linear.weight.dtype)).relu()
            elif self.conv is not None:
                s = self.bn(self.conv(s.to(self.conv.weight.dtype))).relu()
            s, t = widen(s, t)
            s, t = match_size(s, t) if s.dim() == 4 else (s, t)
            return {"loss": self.beta * (s - t).square().mean()}
