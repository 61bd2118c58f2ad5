"""Factor transfer."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from coss_hf.features import Features
from coss_hf.losses.at import attention
from coss_hf.losses.common import check_weights, full_precision, last_maps, match_size, whole_numbers, widen
from coss_hf.utils.vectors import l2_normalize

VARIANTS = ("author", "repdistiller")


def _convolutions(kind: type, widths: tuple[int, ...], norm: bool = False) -> list[nn.Module]:
    """Convolutions 3x3 between ``widths``, each followed by its batch norm (or nothing) and LeakyReLU(0.1)."""
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [kind(a, b, 3, padding=1), nn.BatchNorm2d(b) if norm else nn.Identity(), nn.LeakyReLU(0.1)]
    return layers


def _named(name: str, layers: list[nn.Module]) -> OrderedDict:
    """``name0``, ``name1``, ...: each convolution with what follows it."""
    names = (f"{part}{i}" for i in range(len(layers) // 3) for part in (name, f"{name}_norm", f"{name}_act"))
    return OrderedDict(zip(names, layers))


class FactorLoss(nn.Module):
    """Factor transfer: the student's translation of its map equals the teacher's paraphrase of its own.

    Paraphraser ``P`` and translator ``Q`` are three 3x3 convolutions with LeakyReLU(0.1) each, to ``int(rate *
    teacher_dim)`` channels. ``author`` (the paper): ``loss = beta * mean |u(Q(S)) - u(P(T))|`` over images and entries,
    ``u`` the whole factor of an image at unit length. ``repdistiller``: ``u`` is the attention of AT, and ``Q`` has
    batch norm (statistics per process unless synchronised). The larger factor is averaged down to the smaller. The
    last maps are compared; an embedding counts as a map of one position where a network gives no maps.

    ``paraphraser`` is frozen: before the student's training it learns by ``reconstruction`` (see ``pretraining``).

    Several processes: the mean over the images of this one, exact (``author``) where all have as many.

    Args:
        student_dim, teacher_dim: channels of the last maps, or dimensions of the embeddings.
        beta: scale of the whole loss (500 in the authors' code).
        variant, rate: see above.
        pretraining_steps: batches that the paraphraser learns from first.

    Raises:
        ValueError: an unknown variant, a weight that is no finite number >= 0, maps of other numbers of channels.

    References: Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018
        (arXiv:1802.04977). Original code: github.com/Jangho-Kim/Factor-Transfer-pytorch.
    """

    uses_maps = True
    same_dim = False

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
        self.beta, self.variant, self.dims = beta, variant, (student_dim, teacher_dim)
        down = (teacher_dim, teacher_dim, factors, factors)
        encoder, decoder = _convolutions(nn.Conv2d, down), _convolutions(nn.ConvTranspose2d, down[::-1])
        translator = _convolutions(nn.Conv2d, (student_dim, student_dim, factors, factors), variant == "repdistiller")
        # Names are those of either code.
        if variant == "author":
            self.paraphraser = nn.Sequential(_named("conv", encoder) | _named("deconv", decoder))
            self.translator = nn.Sequential(_named("conv", translator))
        else:
            coder = OrderedDict(encoder=nn.Sequential(*encoder), decoder=nn.Sequential(*decoder))
            self.paraphraser = nn.Sequential(coder)
            self.translator = nn.Sequential(OrderedDict(encoder=nn.Sequential(*translator)))
        self.paraphraser.requires_grad_(False)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, variant={self.variant}"

    def _in_own_precision(self, x: Tensor) -> Tensor:
        return x.to(next(self.translator.parameters()).dtype)

    def reconstruction(self, teacher: Features) -> Tensor:
        """Error of the paraphraser on the teacher's last map ``(b, teacher_dim, h, w)``: mean absolute (``author``) or
        square; a scalar.
        """
        t = self._in_own_precision(last_maps("factor", teacher, teacher, (self.dims[1], self.dims[1]))[1])
        with full_precision(t.device):
            error = l1_loss if self.variant == "author" else mse_loss
            return error(*widen(self.paraphraser(t), t))

    def forward(self, student: Features, teacher: Features, index: Tensor | None = None) -> dict[str, Tensor]:
        s, t = (self._in_own_precision(x) for x in last_maps("factor", student, teacher, self.dims))
        with full_precision(s.device):
            with torch.no_grad():
                encoder = self.paraphraser[: len(self.translator)]
                t = encoder(t)
            s, t = match_size(*widen(self.translator(s), t))
            if self.variant == "author":
                s, t = l2_normalize(s.flatten(1)), l2_normalize(t.flatten(1))
            else:
                s, t = attention(s), attention(t)
            return {"loss": self.beta * (s - t).abs().mean()}
