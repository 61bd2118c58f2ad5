"""Pooling: one embedding per image from the output of a network, and its feature maps."""

from typing import NamedTuple

from torch import Tensor

POOLINGS = ("cls", "mean", "pooler", "gap")


class Layout(NamedTuple):
    """Meaning of the axes of a network's ``last_hidden_state``, found once from its shape.

    Attributes:
        tokens: True for ``(b, n, d)``, False for a map.
        prefix: number of class, register or distillation tokens before the patch tokens.
        channels_last: True for a map ``(b, h, w, d)``, False for ``(b, d, h, w)``.
    """

    tokens: bool
    prefix: int = 0
    channels_last: bool = False


def pool(output, pooling: str, layout: Layout) -> Tensor:
    """One embedding per image from a backbone's output.

    Args:
        output: the output of a Transformers backbone, with ``last_hidden_state`` and maybe ``pooler_output``.
        pooling: ``cls`` (first token), ``mean`` or ``gap`` (mean over positions, class and register tokens left out)
            or ``pooler`` (the network's own ``pooler_output``).
        layout: the layout of ``last_hidden_state``.

    Returns:
        The embeddings ``(b, d)``.
    """
    hidden = output.last_hidden_state
    if pooling == "pooler":
        # (b, d) for ViT, (b, d, 1, 1) for ResNet.
        return output.pooler_output.flatten(1)
    if pooling == "cls":
        return hidden[:, 0]
    if layout.tokens:
        return hidden[:, layout.prefix :].mean(1)
    return hidden.mean((1, 2) if layout.channels_last else (2, 3))


def feature_maps(output, layout: Layout, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """Maps ``(b, c, h, w)`` at the end of each stage, or of each layer where all are of one size.

    Args:
        output: the output of a Transformers backbone with ``output_hidden_states=True``. Tokens become a map, class
            and register tokens left out.
        layout: the layout of its ``last_hidden_state``.
        size: ``(H, W)`` of the input in pixels, whose proportions a map of tokens has.
    """
    hidden = getattr(output, "reshaped_hidden_states", None) or output.hidden_states or ()
    if layout.tokens and hidden and hidden[0].dim() == 3:
        hidden = hidden[1:]  # the first is the embedding of patches, before any layer
    if not hidden:
        return ()
    # The last one as the embedding is made of it, behind a transformer's final norm.
    last = output.last_hidden_state.permute(0, 3, 1, 2) if layout.channels_last else output.last_hidden_state
    maps = tuple(_to_map(x, layout, size) for x in (*hidden[:-1], last))
    last_of_size = {x.shape[-2:]: x for x in maps}
    return tuple(last_of_size.values()) if len(last_of_size) > 1 else maps


def _to_map(hidden: Tensor, layout: Layout, size: tuple[int, int]) -> Tensor:
    if hidden.dim() == 4:
        return hidden
    tokens = hidden[:, layout.prefix :]
    height = round((tokens.shape[1] * size[0] / size[1]) ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (height, -1))


def evenly_spaced(maps: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """``count`` of ``maps`` at even steps, the last included: those of two networks then correspond."""
    return tuple(maps[(i + 1) * len(maps) // count - 1] for i in range(count))
