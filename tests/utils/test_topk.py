"""The blocked top-k below evaluation and neighbour search."""

import pytest
import torch

from coss_hf.utils.topk import blocked_topk


def cut(gallery, size):
    return [(start, gallery[start : start + size]) for start in range(0, len(gallery), size)]


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(90, 5, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(draw, dim=1)


@pytest.mark.parametrize("size", [1, 7, 90])
@pytest.mark.parametrize("pad", [False, True])
def test_blocked_search_equals_full_sort(rows, size, pad):
    values, order = (rows[:20] @ rows[20:].T).sort(dim=1, descending=True)
    best, found = blocked_topk(rows[:20], cut(rows[20:], size), 6, pad=pad)
    assert torch.equal(found, order[:, :6])
    torch.testing.assert_close(best, values[:, :6])


@pytest.mark.parametrize("size", [4, 90])
def test_own_rows_and_too_similar_rows_are_left_out(rows, size):
    gallery = rows.repeat_interleave(2, 0)  # each row has an exact duplicate
    own = torch.arange(0, 180, 2)
    best, found = blocked_topk(rows, cut(gallery, size), 3, own_rows=own)
    assert torch.equal(found[:, 0], own + 1) and not (found == own[:, None]).any()
    best, found = blocked_topk(rows, cut(gallery, size), 3, own_rows=own, max_similarity=0.99)
    assert (best < 0.99).all() and (found // 2 != torch.arange(90)[:, None]).all()


def test_rows_without_enough_candidates_are_padded(rows):
    best, found = blocked_topk(rows[:2], cut(rows[:4], 3), 6, own_rows=torch.arange(2), pad=True)
    assert found.shape == (2, 6) and (found[:, 3:] == -1).all() and (best[:, 3:] == -torch.inf).all()
    assert [set(row) for row in found[:, :3].tolist()] == [{1, 2, 3}, {0, 2, 3}]
    _, none = blocked_topk(rows[:2], cut(rows[:4], 3), 2, max_similarity=-1.0, pad=True)
    assert (none == -1).all()


def test_the_data_type_is_kept(rows):
    for dtype in (torch.float32, torch.float64):
        assert blocked_topk(rows[:3].to(dtype), cut(rows.to(dtype), 8), 2, pad=True)[0].dtype == dtype
