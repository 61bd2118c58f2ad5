"""The most similar rows by inner product, found block by block: memory is bounded by a block, not by the gallery."""

from collections.abc import Iterable

import torch
from torch import Tensor


def blocked_topk(
    queries: Tensor,
    blocks: Iterable[tuple[int, Tensor]],
    k: int,
    *,
    own_rows: Tensor | None = None,
    max_similarity: float = torch.inf,
    pad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find the k gallery rows with the largest inner product with each query; of unit rows that is the cosine.

    Args:
        queries: ``(m, d)``, compared with one block at a time.
        blocks: the gallery in pieces: the number of the first row, and rows ``(b, d)`` on the device of the queries.
        k: Number of rows to find.
        own_rows: ``(m,)`` gallery row of each query, which is not a candidate. By number, so that exact duplicates
            stay candidates.
        max_similarity: Rows as similar as this or more are no candidates.
        pad: Return k columns in any case, with similarity ``-inf`` and row -1 where fewer candidates are left. If
            False, the gallery must have k candidates.

    Returns:
        Similarities ``(m, k)`` and gallery rows ``(m, k)``, the most similar first.
    """
    start_width = k if pad else 0
    best = queries.new_full((len(queries), start_width), -torch.inf)
    found = torch.full((len(queries), start_width), -1, device=queries.device)
    for start, block in blocks:
        similarity = queries @ block.T
        if own_rows is not None:
            inside = ((own_rows >= start) & (own_rows < start + len(block))).nonzero().flatten()
            similarity[inside, own_rows[inside] - start] = -torch.inf
        if max_similarity < torch.inf:
            similarity.masked_fill_(similarity >= max_similarity, -torch.inf)
        values, columns = similarity.topk(min(k, len(block)), dim=1)
        merged = torch.cat([best, values], dim=1)
        best, order = merged.topk(min(k, merged.shape[1]), dim=1)
        found = torch.cat([found, columns + start], dim=1).gather(1, order)
    if pad:
        found[best == -torch.inf] = -1
    return best, found
