"""Memories of training images: rows by image (CRD) and a queue of the newest batches (SEED).

A memory is a plain tensor that its loss registers as a buffer under a name of its own. The
functions here read it and write to it. All reads are without gradient, and take a bounded amount of
memory.

Several processes: writes take the vectors of all processes, in the order of their ranks, so that a
memory stays equal on each of them.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from coss_hf.utils.distributed import all_gather
from coss_hf.utils.vectors import l2_normalize

ROWS = 8  # images whose candidates are read at a time


def uniform_rows(rows: int, dim: int) -> Tensor:
    """Draw a memory ``(rows, dim)`` whose rows have length 1 on average."""
    bound = (dim / 3) ** -0.5
    return torch.empty(rows, dim).uniform_(-bound, bound)


def random_queue(dim: int, size: int) -> Tensor:
    """Draw a queue ``(dim, size)`` of unit columns."""
    return l2_normalize(torch.randn(dim, size).T).T.contiguous()


@torch.no_grad()
def products(v: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
    """Inner products of vectors with rows of a memory: ``<v[n], memory[candidates[n, j]]>``.

    Args:
        v: Vectors ``(b, d)``.
        memory: Memory ``(N, d)``.
        candidates: Rows ``(b, k)`` of the memory.

    Returns:
        Products ``(b, k)``, of the data type of ``v``.
    """
    if _is_small(memory, candidates):
        return (v @ memory.to(v.dtype).T).gather(1, candidates)
    parts = []
    for x, rows in zip(v.split(ROWS), candidates.split(ROWS)):
        parts.append(torch.einsum("bd,bkd->bk", x, embedding(rows, memory).to(x.dtype)))
    return torch.cat(parts)


@torch.no_grad()
def weighted_sums(weights: Tensor, memory: Tensor, candidates: Tensor) -> Tensor:
    """Weighted sums of rows of a memory: ``sum_j weights[n, j] * memory[candidates[n, j]]``.

    Args:
        weights: Weights ``(b, k)``.
        memory: Memory ``(N, d)``.
        candidates: Rows ``(b, k)`` of the memory; a row may occur several times.

    Returns:
        Sums ``(b, d)``, of the data type of ``weights``.
    """
    if _is_small(memory, candidates):
        dense = weights.new_zeros(len(weights), len(memory)).scatter_add_(1, candidates, weights)
        return dense @ memory.to(weights.dtype)
    parts = []
    for x, rows in zip(weights.split(ROWS), candidates.split(ROWS)):
        parts.append(torch.einsum("bk,bkd->bd", x, embedding(rows, memory).to(x.dtype)))
    return torch.cat(parts)


@torch.no_grad()
def update_rows(memories: list[tuple[Tensor, Tensor]], index: Tensor, momentum: float) -> None:
    """Move the rows of a batch towards new vectors: ``M[i] <- l2_normalize(momentum * M[i] + (1 - momentum) * v)``.

    The vectors of all processes are taken. Where an image occurs several times, its last vector
    counts.

    Args:
        memories: Memories ``(N, d)`` of one length, changed in place, each with its new vectors
            ``(b, d)``.
        index: Rows ``(b,)`` of the vectors.
        momentum: Weight of what a row was before, from 0 to 1.
    """
    index = all_gather(index)
    last = _last_positions(index, len(memories[0][0]))
    for memory, vectors in memories:
        vectors = all_gather(vectors)[last].to(memory.dtype)
        memory[index] = l2_normalize(momentum * memory[index] + (1 - momentum) * vectors)


@torch.no_grad()
def enqueue(queue: Tensor, pointer: Tensor, vectors: Tensor) -> None:
    """Replace the oldest columns of a queue by the vectors of all processes, and move its pointer.

    Args:
        queue: Queue ``(d, size)``, changed in place.
        pointer: Index ``(1,)`` of the oldest column, changed in place. Behind the last column comes
            the first.
        vectors: Vectors ``(b, d)``; those of all processes together must be at most ``size``.
    """
    vectors = all_gather(vectors)
    size = queue.shape[1]
    columns = (pointer + torch.arange(len(vectors), device=vectors.device)) % size
    queue[:, columns] = vectors.T.to(queue.dtype)
    pointer.copy_((pointer + len(vectors)) % size)


def _last_positions(index: Tensor, rows: int) -> Tensor:
    """For each entry of ``index`` ``(b,)``, values below ``rows``, the last position with the same value."""
    positions = torch.arange(len(index), device=index.device)
    return index.new_zeros(rows).scatter_reduce(0, index, positions, "amax")[index]


def _is_small(memory: Tensor, candidates: Tensor) -> bool:
    """Whether products with all rows of the memory are faster than reading the rows drawn."""
    return len(memory) <= 32 * candidates.shape[1]
