"""Weighted k-nearest-neighbour classification of embeddings, and the exact search below it."""

import torch
from torch import Tensor

from coss_hf.utils.topk import blocked_topk
from coss_hf.utils.vectors import l2_normalize

MAX_CLASSES = 1_000_000  # of a table with a column for each
GALLERY_CHUNK = 65_536  # gallery rows compared at once: bounds memory for galleries of millions


def unit(x: Tensor) -> Tensor:
    """Rows scaled to unit length, in float32 or wider; an all-zero row stays zero."""
    return l2_normalize(x if x.dtype == torch.float64 else x.float())


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
    queries: Tensor, gallery: Tensor, k: int, *, exclude_self: bool = False, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Find the k rows of the gallery that are most similar to each query by cosine, the most similar first.

    Args:
        queries: ``(m, d)``; need not be normalised.
        gallery: ``(n, d)``; need not be normalised.
        k: Number of rows to find.
        exclude_self: The queries are the gallery itself, and row i is not a neighbour of row i; by index, so that
            exact duplicates count as neighbours of each other.
        chunk: Queries compared at once with at most 65,536 gallery rows.

    Returns:
        Cosines ``(m, k)`` and gallery indices ``(m, k)``. Computed in float32 or wider.

    Raises:
        ValueError: different dimensions; k below 1 or above the number of candidates.
    """
    check_pair(queries, gallery, "queries and gallery")
    available = len(gallery) - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"k={k} must be between 1 and {available}, the number of gallery rows to choose from.")
    queries = unit(queries)
    gallery = unit(gallery)
    blocks = [(start, gallery[start : start + GALLERY_CHUNK]) for start in range(0, len(gallery), GALLERY_CHUNK)]
    similarity = queries.new_empty(len(queries), k)
    index = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
    row_numbers = torch.arange(len(queries), device=queries.device)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        own_rows = row_numbers[rows] if exclude_self else None
        similarity[rows], index[rows] = blocked_topk(queries[rows], blocks, k, own_rows=own_rows)
    return similarity, index


def _vote(similarity: Tensor, neighbor_labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    # Relative to the nearest neighbour, so that a small temperature cannot overflow; the shares stay the same.
    weights = ((similarity - similarity[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, neighbor_labels, weights)
    return votes / votes.sum(1, keepdim=True)


def _check(train_features: Tensor, train_labels: Tensor, temperature: float) -> None:
    check_labels(train_labels, train_features, "train_labels")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0.")


def _width(train_labels: Tensor, num_classes: int | None) -> int:
    """Return the number of classes to vote for: ``num_classes``, or by default as many as the train labels need."""
    needed = int(train_labels.max()) + 1 if len(train_labels) else 0
    if num_classes is None:
        if needed > MAX_CLASSES:
            raise ValueError(f"train_labels reach {needed - 1:,}: number the classes from 0 on.")
        return needed
    if not needed <= num_classes <= MAX_CLASSES:
        raise ValueError(
            f"num_classes={num_classes} must be between {needed}, the largest of train_labels plus one, and "
            f"{MAX_CLASSES:,}; leave it out to take the former."
        )
    return num_classes


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Predict the class of each test image by the vote of its k nearest train images.

    The weight of a vote is ``exp(cosine / temperature)``.

    Args:
        train_features: ``(n, d)`` embeddings of the train images, normalised here.
        train_labels: ``(n,)`` class numbers of the train images.
        test_features: ``(m, d)`` embeddings of the test images, normalised here.
        k: Number of train images that vote.
        temperature: Above 0; the smaller, the more the nearest images decide.
        num_classes: Width of the result, by default the largest train label plus one, and never less. At most
            1,000,000: number classes from 0 on.
        chunk: Test images compared at once.

    Returns:
        Predicted classes ``(m,)`` and shares of the vote ``(m, num_classes)``, in the dtype of the embeddings
        (float32 at least).

    Raises:
        ValueError: k above the number of train images, a temperature that is not positive, shapes that do not match,
            a number of classes that leaves out train labels or is above 1,000,000.

    References:
        Wu et al., CVPR 2018 (arXiv:1805.01978); Caron et al., DINO, ICCV 2021 (arXiv:2104.14294), eval_knn.py.
    """
    _check(train_features, train_labels, temperature)
    num_classes = _width(train_labels, num_classes)
    similarity, index = nearest(test_features, train_features, k, chunk=chunk)
    shares = _vote(similarity, train_labels[index].long(), temperature, num_classes)
    return shares.argmax(1), shares


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    ks: tuple[int, ...] = (10, 20),
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[str, float]:
    """Share of the test images that :func:`knn_predict` classifies as ``test_labels`` ``(m,)``; one search for all k.

    Returns ``{"knn10": ..., "knn20": ...}``, one entry in [0, 1] for every k; raises as :func:`knn_predict` does.
    """
    _check(train_features, train_labels, temperature)
    check_labels(test_labels, test_features, "test_labels")
    if len(test_features) == 0 or len(ks) == 0:
        raise ValueError(
            f"an accuracy needs test_features (got {len(test_features)}) and at least one k (got ks={ks})."
        )
    similarity, index = nearest(test_features, train_features, max(ks), chunk=chunk)
    # Classes that occur, so that tables are as wide as there are classes, however large their numbers.
    classes, numbers = train_labels.unique(return_inverse=True)
    neighbor_labels = numbers[index]
    accuracy = {}
    for k in ks:
        shares = _vote(similarity[:, :k], neighbor_labels[:, :k], temperature, len(classes))
        accuracy[f"knn{k}"] = int((classes[shares.argmax(1)] == test_labels).sum()) / len(test_labels)
    return accuracy
