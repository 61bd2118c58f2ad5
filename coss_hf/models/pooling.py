"""Pooling: one embedding per image from the output of a network, and its feature maps."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import layer_norm

POOLINGS = ("cls", "mean", "pooler", "gap")


class Layout(NamedTuple):
    """Meaning of the axes of a network's ``last_hidden_state``, found once from its shape.

    Attributes:
        tokens: True for ``(b, n, d)``, False for a map.
        prefix: number of class, register or distillation tokens before the patch tokens.
        channels_last: True for a map ``(b, h, w, d)``, False for ``(b, d, h, w)``.
        suffix: number of tokens after the patch tokens, such as those that YOLOS detects objects with.
        pooled: name of the output that holds the network's own embedding of an image; empty where it has none.
        class_output: name of the output ``(b, 1, d)`` that holds the class token where ``last_hidden_state`` does not.
    """

    tokens: bool
    prefix: int = 0
    channels_last: bool = False
    suffix: int = 0
    pooled: str = "pooler_output"
    class_output: str = ""

    @property
    def has_class_token(self) -> bool:
        """Whether there is a token of the complete image."""
        return bool(self.class_output or (self.tokens and self.prefix))

    @property
    def patches(self) -> slice:
        """The patch tokens of ``last_hidden_state``."""
        return slice(self.prefix, -self.suffix or None)


def token_layout(count: int, size: tuple[int, int], patch: tuple[int, int] | None, suffix: int = 0) -> Layout:
    """Layout of ``count`` tokens of an image: those that its grid of patches does not account for are not patches.

    Args:
        count: number of tokens.
        size: ``(h, w)`` of the image in pixels.
        patch: ``(h, w)`` of a patch in pixels; None where it is not known.
        suffix: number of tokens after the patch tokens.
    """
    count -= suffix
    grids = []
    if patch:
        grids = [(size[0] // patch[0]) * (size[1] // patch[1])]
    if not grids or grids[0] > count:
        # Networks of stages give fewer tokens than patches: the largest grid of the image's proportions that fits.
        for stride in range(1, max(size) + 1):
            grids.append((size[0] // stride) * (size[1] // stride))
            grids.append(math.ceil(size[0] / stride) * math.ceil(size[1] / stride))
    patches = max(grid for grid in grids if grid <= count)
    return Layout(tokens=True, prefix=count - patches, suffix=suffix)


def is_channels_last(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether a map of this shape is ``(b, h, w, d)``, by the proportions of the image; ``(b, d, h, w)`` in doubt."""
    return not _is_grid(shape[2:], size) and _is_grid(shape[1:3], size)


def channels_first(maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
    """The maps of one network as ``(b, d, h, w)``: where one is ``(b, h, w, d)``, so are those that can be either.

    Args:
        maps: of one layout, or each of its own.
        size: ``(H, W)`` of the input in pixels.
    """
    shapes = [tuple(one.shape) for one in maps]
    last = [is_channels_last(shape, size) for shape in shapes]
    if any(last):  # one whose first sizes are no grid has been turned by the network, often behind its last stage
        last = [_is_grid(shape[1:3], size) for shape in shapes]
    return tuple(one.permute(0, 3, 1, 2) if turned else one for one, turned in zip(maps, last, strict=True))


def _is_grid(sides: tuple[int, ...], size: tuple[int, int]) -> bool:
    strides = range(1, max(size) + 1)
    floors = any((size[0] // stride, size[1] // stride) == tuple(sides) for stride in strides)
    return floors or any((-(-size[0] // stride), -(-size[1] // stride)) == tuple(sides) for stride in strides)


def pool(output, pooling: str, layout: Layout) -> Tensor:
    """One embedding per image from a backbone's output.

    Args:
        output: the output of a Transformers backbone, with ``last_hidden_state`` and maybe ``pooler_output``.
        pooling: ``cls`` (first token), ``mean`` or ``gap`` (mean over positions, class and register tokens left out)
            or ``pooler`` (the network's own embedding of an image, such as ``pooler_output``).
        layout: the layout of ``last_hidden_state``.

    Returns:
        The embeddings ``(b, d)``.
    """
    hidden = output.last_hidden_state
    if pooling == "pooler":
        # (b, d) for ViT, (b, d, 1, 1) for ResNet.
        return getattr(output, layout.pooled).flatten(1)
    if pooling == "cls" and layout.class_output:
        # CvT's classifier normalises it. The scale and shift of that belong to the classifier, which AutoModel drops.
        token = getattr(output, layout.class_output)[:, 0]
        return layer_norm(token, token.shape[1:])
    if pooling == "cls":
        return hidden[:, 0]
    if layout.tokens:
        return hidden[:, layout.patches].mean(1)
    return hidden.mean((1, 2) if layout.channels_last else (2, 3))


def feature_maps(output, layout: Layout, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Maps ``(b, c, h, w)`` at the end of each stage, or of each layer where all are of one size.

    Args:
        output: the output of a Transformers backbone with ``output_hidden_states=True``. Tokens become a map, class
            and register tokens left out.
        layout: the layout of its ``last_hidden_state``.
        size: ``(H, W)`` of the input in pixels, whose proportions a map of tokens has.
    """
    if getattr(output, "maps", None):  # of a plain module
        return tuple(output.maps)
    hidden = getattr(output, "reshaped_hidden_states", None) or output.hidden_states or ()
    if layout.tokens and hidden and hidden[0].dim() == 3:
        hidden = hidden[1:]  # the first is the embedding of patches, before any layer
    if not hidden:
        return ()
    # The last one as the embedding is made of it, behind a transformer's final norm.
    last = output.last_hidden_state.permute(0, 3, 1, 2) if layout.channels_last else output.last_hidden_state
    earlier = hidden[:-1]
    if all(x.dim() == 4 for x in earlier):
        earlier = channels_first(earlier, size)
    maps = tuple(_to_map(x, layout, size) for x in (*earlier, last))
    last_of_size = {x.shape[-2:]: x for x in maps}
    return tuple(last_of_size.values()) if len(last_of_size) > 1 else maps


def _to_map(hidden: Tensor, layout: Layout, size: tuple[int, int]) -> Tensor:
    if hidden.dim() == 4:
        return hidden
    tokens = hidden[:, layout.patches]
    height = round((tokens.shape[1] * size[0] / size[1]) ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


def evenly_spaced(maps: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """``count`` of ``maps`` at even steps, the last included: those of two networks then correspond."""
    return tuple(maps[(i + 1) * len(maps) // count - 1] for i in range(count))
