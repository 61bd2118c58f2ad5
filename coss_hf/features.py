"""Features of a vision network: what the losses compare."""

from typing import NamedTuple

from torch import Tensor


class Features(NamedTuple):
    """What a network says of a batch.

    Attributes:
        embedding: ``(b, d)``.
        maps: intermediate feature maps, each ``(b, c, h, w)``; empty unless a method asks for them.
        logits: ``(b, classes)`` where the network has a classifier, else None.
    """

    embedding: Tensor
    maps: tuple[Tensor, ...] = ()
    logits: Tensor | None = None
