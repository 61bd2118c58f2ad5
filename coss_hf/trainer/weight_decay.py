"""Which parameters weight decay is for."""

import re

from torch import nn

# Tokens, positions and biases, whose length says something: how parameters are called that are learnt for them.
_TOKENS = re.compile(
    r"(.*_)?(tokens?|position\w*|pos|pos_emb\w*|rel_pos\w*|relative_position\w*|class_emb\w*|bias(es)?|"
    r"(cls|mask|reg|register|query|row|col|column)_emb\w*)"
)


def matrices(model: nn.Module) -> list[str]:
    """Return the names of the weights of linear and convolutional layers.

    Not of biases, norms and scales, which have one dimension, nor of position, class, mask and register tokens.

    Args:
        model: any module.

    Example:
        >>> matrices(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        ['0.weight']
    """
    embedded = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if _is_matrix(name, parameter.shape) and id(parameter) not in embedded
    ]


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    if sum(side > 1 for side in shape) < 2:  # (1, 1, d) is a token, (c, 1, 1) a scale
        return False
    one_of_images = len(shape) in (3, 4) and shape[0] == 1 and not name.endswith("weight")  # (1, tokens, d)
    return not one_of_images and not _TOKENS.fullmatch(name.rpartition(".")[2])
