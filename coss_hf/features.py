"""Features of a vision network: what the losses compare."""

from collections.abc import Sequence
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


def as_features(value: Features | Tensor | Sequence[Tensor], *, logits: bool = False, argument: str = "") -> Features:
    """Wrap what a loss was called with.

    Args:
        value: Features, which are returned unchanged; embeddings ``(b, d)``; one feature map ``(b, c, h, w)``; or a
            list of feature maps, from the first to the last. The embedding of maps is the mean of the last over its
            positions.
        logits: whether a tensor ``(b, d)`` holds logits.
        argument: the name of the parameter, for errors.

    Raises:
        ValueError: anything else.

    Example:
        >>> import torch
        >>> as_features(torch.zeros(2, 3)).embedding.shape
        torch.Size([2, 3])
    """
    if isinstance(value, Features):
        return value
    if isinstance(value, Tensor) and value.dim() == 2:
        return Features(value, logits=value if logits else None)
    maps = (value,) if isinstance(value, Tensor) else value
    if isinstance(maps, (list, tuple)) and maps and all(isinstance(x, Tensor) and x.dim() == 4 for x in maps):
        return Features(maps[-1].mean((2, 3)), tuple(maps))
    shape = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ValueError(
        f"{argument}: got {shape}; give embeddings (b, d), feature maps (b, c, h, w), a list of feature maps, or "
        f"Features."
    )
