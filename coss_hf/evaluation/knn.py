"""Weighted k-nearest-neighbour classification of embeddings, and the exact search below it."""

import torch
import torch.nn.functional as F
from torch import Tensor

BANK_CHUNK = 65_536  # bank rows compared at once: bounds memory for banks of millions


def unit(x: Tensor) -> Tensor:
    """Rows scaled to unit length, in float32 or wider; an all-zero row stays zero."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1, eps=1e-12)


def check_pair(a: Tensor, b: Tensor, names: str) -> None:
    """Raises ValueError unless ``a`` and ``b`` are embeddings ``(., d)`` of one dimension."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{names} must be embeddings (n, d) of the same dimension, got {tuple(a.shape)} and {tuple(b.shape)}."
        )


def check_labels(labels: Tensor, rows: Tensor, name: str) -> None:
    """Raises ValueError unless ``labels`` has one class number >= 0 for every row of ``rows``."""
    if labels.shape != rows.shape[:1] or labels.is_floating_point() or (len(labels) > 0 and labels.min() < 0):
        raise ValueError(
            f"{name} must hold one class number >= 0 for each of the {len(rows)} embeddings, got {labels.dtype} of "
            f"shape {tuple(labels.shape)}: leave out unlabelled images."
        )


@torch.no_grad()
def nearest(
    queries: Tensor, bank: Tensor, k: int, *, exclude_self: bool = False, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """The k rows of the bank most similar to every query, by cosine, most similar first.

    Args:
        queries: ``(m, d)``; need not be normalised.
        bank: ``(n, d)``.
        k: how many.
        exclude_self: ``queries`` are the bank itself, and row i is not a neighbour of row i; by index, so that exact
            duplicates count as neighbours of each other.
        chunk: queries compared at once with at most 65,536 bank rows.

    Returns:
        Cosines ``(m, k)`` and bank indices ``(m, k)``. Computed in float32 or wider.

    Raises:
        ValueError: different dimensions; k below 1 or above the number of candidates.
    """
    check_pair(queries, bank, "queries and bank")
    available = len(bank) - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"k={k} must be between 1 and {available}, the number of bank rows to choose from.")
    queries, bank = unit(queries), unit(bank)
    similarity = queries.new_empty(len(queries), k)
    index = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        best, best_index = similarity[rows, :0], index[rows, :0]
        for offset in range(0, len(bank), BANK_CHUNK):
            cosines = queries[rows] @ bank[offset : offset + BANK_CHUNK].T
            if exclude_self:
                cosines.diagonal(start - offset).fill_(-torch.inf)  # empty where this block holds none of the rows
            values, columns = cosines.topk(min(k, cosines.shape[1]))
            best, order = (merged := torch.cat([best, values], 1)).topk(min(k, merged.shape[1]))
            best_index = torch.cat([best_index, columns + offset], 1).gather(1, order)
        similarity[rows], index[rows] = best, best_index
    return similarity, index


def _vote(similarity: Tensor, neighbor_labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    # Relative to the nearest neighbour, so that a small temperature cannot overflow; the shares stay the same.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, neighbor_labels, weights)
    return votes / votes.sum(1, keepdim=True)


def _check(bank: Tensor, bank_labels: Tensor, temperature: float) -> None:
    check_labels(bank_labels, bank, "bank_labels")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0.")


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Class of every query by the vote of its k nearest bank rows, each with weight ``exp(cosine / temperature)``.

    Args:
        bank: ``(n, d)`` embeddings, normalised here.
        bank_labels: ``(n,)`` class numbers.
        queries: ``(m, d)``.
        num_classes: width of the result; the largest bank label plus one by default.
        chunk: queries compared at once.

    Returns:
        Predicted classes ``(m,)`` and shares of the vote ``(m, num_classes)``, in the dtype of the embeddings
        (float32 at least).

    Raises:
        ValueError: k above the size of the bank, a temperature that is not positive, shapes that do not match.

    References:
        Wu et al., CVPR 2018 (arXiv:1805.01978); Caron et al., DINO, ICCV 2021 (arXiv:2104.14294), eval_knn.py.
    """
    _check(bank, bank_labels, temperature)
    similarity, index = nearest(queries, bank, k, chunk=chunk)
    shares = _vote(similarity, bank_labels[index].long(), temperature, num_classes or int(bank_labels.max()) + 1)
    return shares.argmax(1), shares


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    ks: tuple[int, ...] = (10, 20),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[str, float]:
    """Share of the queries that :func:`knn_predict` classifies as ``labels`` ``(m,)``, for several k at one search.

    Returns ``{"knn10": ..., "knn20": ...}``, one entry in [0, 1] for every k; raises as :func:`knn_predict` does.
    """
    _check(bank, bank_labels, temperature)
    check_labels(labels, queries, "labels")
    if len(queries) == 0 or len(ks) == 0:
        raise ValueError(f"an accuracy needs queries (got {len(queries)}) and at least one k (got ks={ks}).")
    similarity, index = nearest(queries, bank, max(ks), chunk=chunk)
    neighbor_labels, num_classes = bank_labels[index].long(), int(bank_labels.max()) + 1
    accuracy = {}
    for k in ks:
        shares = _vote(similarity[:, :k], neighbor_labels[:, :k], temperature, num_classes)
        accuracy[f"knn{k}"] = int((shares.argmax(1) == labels).sum()) / len(labels)
    return accuracy
