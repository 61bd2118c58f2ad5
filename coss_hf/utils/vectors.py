"""Vectors of length 1, for losses, evaluation, export and recipes. Needs torch alone.

The neighbour search has its own, in float64, for embeddings whose squares float32 cannot hold.
"""

import torch
from torch import Tensor

EPS = 1e-12


def l2_normalize(x: Tensor) -> Tensor:
    """Divide the vectors along the last dimension of ``x`` by their Euclidean norms.

    Norms are clamped at 1e-12 from below. A vector that is exactly zero has no direction: it stays
    zero and gets no gradient, where the literal derivative of the clamped norm would be 1e12.

    Args:
        x: Vectors ``(..., d)``, floating point.

    Returns:
        Tensor of the shape and data type of ``x``.

    Example:
        >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    squares = x.square().sum(-1, keepdim=True)
    is_zero = squares == 0
    # sqrt has an infinite slope at 0: keep it out of the graph.
    norms = torch.where(is_zero, 1.0, squares).sqrt().clamp_min(EPS)
    return torch.where(is_zero, 0.0, x / norms)
