"""Vectors: to length 1, for losses, evaluation, export and recipes; and the ones that are not finite.

Needs torch alone. The neighbour search has its own, in float64, for embeddings whose squares float32 cannot hold.
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


def rows_not_finite(x: Tensor, first: int = 0) -> list[int]:
    """Return the numbers of the rows that hold NaN or infinity.

    Args:
        x: Vectors ``(n, d)``, floating point.
        first: Number of the first row.

    Example:
        >>> rows_not_finite(torch.tensor([[1.0, 2.0], [0.0, torch.inf]]), first=10)
        [11]
    """
    # In chunks, since `isfinite` makes a tensor of the same size.
    finite = torch.cat([chunk.isfinite().all(dim=1) for chunk in x.split(1024)])
    return [first + row for row in (~finite).nonzero().flatten().tolist()]
