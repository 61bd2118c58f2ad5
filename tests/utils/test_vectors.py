"""One normalisation for all packages."""

import doctest

import pytest
import torch

import coss_hf.utils.vectors
from coss_hf.utils.vectors import l2_normalize, rows_not_finite


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 5)])
def test_l2_normalize_equals_the_formula(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(l2_normalize(x), x / x.norm(dim=-1, keepdim=True))


def test_l2_normalize_leaves_zero_vectors_and_gives_them_no_gradient():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    y = l2_normalize(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert torch.equal(x.grad[0], torch.zeros(2))
    assert x.grad.isfinite().all()


def test_l2_normalize_clamps_tiny_norms():
    x = torch.tensor([[1e-15, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(l2_normalize(x), torch.tensor([[1e-3, 0.0]], dtype=torch.float64))


def test_rows_that_are_not_finite_are_numbered_from_the_first():
    x = torch.zeros(2500, 2)
    x[[3, 1024, 2499], [0, 1, 0]] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert rows_not_finite(x) == [3, 1024, 2499] and rows_not_finite(x[:3]) == []
    assert rows_not_finite(x[2048:], first=100) == [551]


def test_example_in_the_docstring_runs():
    result = doctest.testmod(coss_hf.utils.vectors)
    assert result.attempted and not result.failed
