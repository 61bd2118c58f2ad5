"""Image retrieval: how early images of a query's class come in a gallery ordered by similarity."""

import torch
from torch import Tensor

from coss_hf.evaluation.knn import check_labels, check_pair, unit

MAX_QUERIES = 1000  # the gallery is sorted for each


@torch.no_grad()
def retrieval(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor,
    gallery_labels: Tensor,
    ks: tuple[int, ...] = (1, 10),
    *,
    max_queries: int = MAX_QUERIES,
    chunk: int = 64,
) -> dict[str, float]:
    """Recall at k and mean average precision of retrieval by cosine.

    Queries and gallery may come from different networks that share a space (asymmetric retrieval).

    Args:
        queries: ``(m, d)`` embeddings, none of them of a gallery image.
        query_labels: ``(m,)`` class numbers of the queries.
        gallery: ``(n, d)`` embeddings of the images to retrieve from.
        gallery_labels: ``(n,)`` class numbers of the gallery.
        ks: Ranks at which recall is measured.
        max_queries: Where there are more queries, only so many are taken, drawn with a fixed seed.
        chunk: Queries compared at once.

    Returns:
        ``recall{k}``, the share of queries with an image of their class among the k nearest, and ``map``, the mean
        over queries of the precision at each image of their class in the complete ordered gallery. Fractions in [0, 1].
        Queries whose class the gallery lacks are left out; 0 where that leaves none. Equal cosines are in gallery
        order.

    Raises:
        ValueError: dimensions or labels that do not match, no queries, a k that the gallery does not reach.

    References:
        Mean average precision: Manning, Raghavan & Schütze, Introduction to Information Retrieval, 2008, section 8.4.
        Asymmetric retrieval: Budnik & Avrithis, CVPR 2021 (arXiv:2006.13525).
    """
    check_pair(queries, gallery, "queries and gallery")
    check_labels(query_labels, queries, "query_labels")
    check_labels(gallery_labels, gallery, "gallery_labels")
    if len(queries) == 0 or not ks or not 1 <= min(ks) <= max(ks) <= len(gallery):
        raise ValueError(
            f"retrieval needs queries (got {len(queries)}) and ks between 1 and the {len(gallery)} gallery images "
            f"(got {ks})."
        )
    if len(queries) > max_queries:
        rows = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:max_queries]
        queries = queries[rows.to(queries.device)]
        query_labels = query_labels[rows.to(query_labels.device)]
    queries = unit(queries)
    gallery = unit(gallery)
    query_labels = query_labels.to(queries.device)
    gallery_labels = gallery_labels.to(queries.device)
    ranks = torch.arange(1, len(gallery) + 1, device=queries.device, dtype=torch.float64)
    sums = torch.zeros(len(ks) + 1, dtype=torch.float64)
    count = 0
    for part, classes in zip(queries.split(chunk), query_labels.split(chunk), strict=True):
        # The full order, which the precision at each relevant image needs: no search for the k nearest would do.
        order = (part @ gallery.T).argsort(dim=1, descending=True, stable=True)
        relevant = gallery_labels[order] == classes[:, None]
        relevant = relevant[relevant.any(1)]
        count += len(relevant)
        found = torch.stack([relevant[:, :k].any(1).sum() for k in ks]).double()
        precision = relevant.cumsum(1) / ranks
        average = (precision * relevant).sum(1) / relevant.sum(1)
        sums += torch.cat([found, average.sum()[None]]).cpu()
    names = [*(f"recall{k}" for k in ks), "map"]
    return dict(zip(names, (sums / max(count, 1)).tolist()))
