"""Factor transfer."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from coss_hf.features import Features
from coss_hf.losses.at import attention
from coss_hf.losses.base import Citation, DistillationLoss
from coss_hf.losses.common import check_weights, full_precision, last_maps, match_size, whole_numbers, widen
from coss_hf.utils.vectors import l2_normalize

VARIANTS = ("author", "repdistiller")


def _convolutions(kind: type[nn.Module], widths: tuple[int, ...], batch_norm: bool = False) -> list[nn.Module]:
    """Build 3x3 convolutions between ``widths``, each followed by its batch norm (or nothing) and LeakyReLU(0.1)."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers.append(kind(a, b, 3, padding=1))
        layers.append(nn.BatchNorm2d(b) if batch_norm else nn.Identity())
        layers.append(nn.LeakyReLU(0.1))
    return layers


def _named(name: str, layers: list[nn.Module]) -> OrderedDict[str, nn.Module]:
    """Name each convolution ``name0``, ``name1``, ..., and the two layers after it accordingly."""
    named = OrderedDict()
    for i in range(len(layers) // 3):
        convolution, norm, activation = layers[3 * i : 3 * i + 3]
        named[f"{name}{i}"] = convolution
        named[f"{name}_norm{i}"] = norm
        named[f"{name}_act{i}"] = activation
    return named


class FactorLoss(DistillationLoss):
    """Factor transfer: the student's translation of its last map equals the teacher's paraphrase of its own.

    Paraphraser ``P`` and translator ``Q`` are three 3x3 convolutions with LeakyReLU(0.1) each, to
    ``int(rate * teacher_dim)`` channels. Variant ``author`` (the paper):
    ``loss = beta * mean |u(Q(S)) - u(P(T))|`` over images and entries, where ``u`` brings the
    factor of an image to length 1. Variant ``repdistiller``: ``u`` is the attention of AT, and
    ``Q`` has batch norm (statistics per process unless synchronised). The larger factor is averaged
    down to the smaller.

    Before the training of the student the paraphraser learns to reconstruct the teacher's maps
    (``reconstruction``); then it is frozen.

    Shapes: last maps ``(b, c, h, w)``, whose channels and sizes may differ. An embedding counts as
    a map of one position where a network gives no maps.

    Several processes: the loss is the mean over the images of this process, which is exact
    (``author``) where all have as many.

    Use when: the last maps differ in channels and the student should learn a compressed form of the
    teacher's map. It costs a pre-training of the paraphraser. For embeddings rather than maps, CoSS
    is simpler and faster.

    Args:
        student_dim: Channels of the student's last map, or dimension of its embedding.
        teacher_dim: Channels of the teacher's last map, or dimension of its embedding.
        beta: Scale of the loss (500 in the authors' code).
        variant: ``author`` or ``repdistiller``, see above.
        rate: Channels of a factor, as a share of the teacher's.
        pretraining_steps: Number of batches that the paraphraser learns from before the student's
            training.

    Returns (when called): ``loss``.

    Raises:
        ValueError: An unknown variant; a weight that is negative or not finite; maps of other
            numbers of channels.

    Example:
        >>> import torch
        >>> from coss_hf.features import Features
        >>> from coss_hf.losses.factor import FactorLoss
        >>> loss = FactorLoss(student_dim=3, teacher_dim=4)
        >>> student = Features(torch.zeros(2, 3), (torch.ones(2, 3, 8, 8),))
        >>> teacher = Features(torch.zeros(2, 4), (torch.ones(2, 4, 4, 4),))
        >>> loss(student, teacher)["loss"].shape
        torch.Size([])
        >>> loss.pretraining_steps, loss.reconstruction(teacher).requires_grad  # frozen but for its pre-training
        (500, False)

    References:
        Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS
        2018 (arXiv:1802.04977). Original code: github.com/Jangho-Kim/Factor-Transfer-pytorch.
        ``repdistiller``: github.com/HobbitLong/RepDistiller.
    """

    name = "factor"
    revision = 2  # 1: with neighbours, fewer images in the batches of the pre-training
    reads = "last_map"
    citation = Citation(
        authors="Kim, J. and others",
        title="Paraphrasing Complex Network: Network Compression via Factor Transfer",
        venue="NeurIPS",
        year=2018,
        arxiv="1802.04977",
    )

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        beta: float = 200.0,
        variant: str = "author",
        rate: float = 0.5,
        pretraining_steps: int = 500,
    ):
        super().__init__()
        check_weights(beta=beta, rate=rate, pretraining_steps=pretraining_steps)
        (self.pretraining_steps,) = whole_numbers(pretraining_steps=pretraining_steps)
        factors = int(rate * teacher_dim)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is unknown: choose one of {', '.join(VARIANTS)}.")
        if factors < 1:
            raise ValueError(f"rate={rate} leaves no channel of {teacher_dim}: give at least {1 / teacher_dim:.2g}.")
        self.beta = beta
        self.variant = variant
        self.student_dim = student_dim
        self.teacher_dim = teacher_dim
        encoder = _convolutions(nn.Conv2d, (teacher_dim, teacher_dim, factors, factors))
        decoder = _convolutions(nn.ConvTranspose2d, (factors, factors, teacher_dim, teacher_dim))
        translator = _convolutions(
            nn.Conv2d, (student_dim, student_dim, factors, factors), batch_norm=variant == "repdistiller"
        )
        # The names of the layers are those of either code.
        if variant == "author":
            self.paraphraser = nn.Sequential(_named("conv", encoder) | _named("deconv", decoder))
            self.translator = nn.Sequential(_named("conv", translator))
        else:
            self.paraphraser = nn.Sequential(
                OrderedDict(encoder=nn.Sequential(*encoder), decoder=nn.Sequential(*decoder))
            )
            self.translator = nn.Sequential(OrderedDict(encoder=nn.Sequential(*translator)))
        self.paraphraser.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, variant={self.variant}"

    def pretraining_module(self) -> nn.Module:
        return self.paraphraser

    def pretraining_loss(self, teacher: Features) -> Tensor:
        return self.reconstruction(teacher)

    def reconstruction(self, teacher: Features) -> Tensor:
        """Compute the error of the paraphraser on the teacher's last map ``(b, teacher_dim, h, w)``, a scalar.

        It is the mean absolute error (``author``) or the mean square error (``repdistiller``).
        """
        _, t = last_maps(self.name, teacher, teacher, student_dim=self.teacher_dim, teacher_dim=self.teacher_dim)
        t = self._in_own_precision(t)
        with full_precision(t.device):
            error = l1_loss if self.variant == "author" else mse_loss
            return error(*widen(self.paraphraser(t), t))

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = last_maps(self.name, student, teacher, student_dim=self.student_dim, teacher_dim=self.teacher_dim)
        s = self._in_own_precision(s)
        t = self._in_own_precision(t)
        with full_precision(s.device):
            with torch.no_grad():
                encoder = self.paraphraser[: len(self.translator)]
                t = encoder(t)
            s, t = match_size(*widen(self.translator(s), t))
            if self.variant == "author":
                s = l2_normalize(s.flatten(1))
                t = l2_normalize(t.flatten(1))
            else:
                s = attention(s)
                t = attention(t)
            return {"loss": self.beta * (s - t).abs().mean()}

    def _in_own_precision(self, x: Tensor) -> Tensor:
        return x.to(next(self.translator.parameters()).dtype)
