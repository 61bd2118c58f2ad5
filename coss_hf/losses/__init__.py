"""One file a loss, one plain dictionary of names.

A loss is a module called with student and teacher ``Features`` and the dataset indices of the images. It never holds
a network and returns a dictionary of scalars with the key ``loss``.
"""

from torch import nn

from coss_hf.losses.coss import CoSSLoss

LOSSES = {
    "coss": CoSSLoss,
}
# Arguments of a run, beside beta, that a loss takes.
OPTIONS = {
    "coss": ("lambda_ss",),
}
# Those with `totals`: sums over a batch that the loss is computed from (exact accumulation).
SEPARABLE = ("coss",)


def build_loss(args) -> nn.Module:
    """The loss that ``DistillationArguments`` ask for."""
    options = {name: getattr(args, name) for name in ("beta", *OPTIONS[args.method])}
    return LOSSES[args.method](**{name: value for name, value in options.items() if value is not None})
