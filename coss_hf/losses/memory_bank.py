"""Products with rows of a large memory: without gradient, in bounded space."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

ROWS = 8  # images whose candidates are read at a time


@torch.no_grad()
def products(v: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
    """``<v[n], memory[candidates[n, j]]>``, ``(b, 1 + K)``."""
    if _is_small(memory, candidates):
        return (v @ memory.to(v.dtype).T).gather(1, candidates)
    parts = zip(v.split(ROWS), candidates.split(ROWS))
    return torch.cat([torch.einsum("bd,bkd->bk", x, embedding(rows, memory).to(x.dtype)) for x, rows in parts])


@torch.no_grad()
def weighted(weights: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
    """Sums of ``memory[candidates[n, j]]`` times ``weights[n, j]``, ``(b, d)``."""
    if _is_small(memory, candidates):
        dense = weights.new_zeros(len(weights), len(memory)).scatter_add_(1, candidates, weights)
        return dense @ memory.to(weights.dtype)
    parts = zip(weights.split(ROWS), candidates.split(ROWS))
    return torch.cat([torch.einsum("bk,bkd->bd", x, embedding(rows, memory).to(x.dtype)) for x, rows in parts])


def _is_small(memory: Tensor, candidates: Tensor) -> bool:
    """Whether products with the whole memory are faster than reading the rows drawn."""
    return len(memory) <= 32 * candidates.shape[1]
