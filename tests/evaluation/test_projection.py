import torch

from coss_hf.evaluation.projection import plane, planes


def draw(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_principal_components_of_directions():
    x = draw(50, 6) * torch.tensor([5.0, 3, 1, 0.5, 0.5, 0.1]) + 1
    unit = torch.nn.functional.normalize(x, dim=1)
    u, s, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    expected = expected / expected.square().sum(1).mean().sqrt()
    torch.testing.assert_close(plane(3 * x).abs(), expected.abs())


def test_projection_aligns_rotated_embeddings_with_the_teacher():
    teacher = draw(60, 5) * torch.tensor([4.0, 2, 1, 1, 1])
    turn = torch.linalg.qr(draw(5, 5, seed=1))[0]
    student, there = planes(teacher @ turn, teacher)
    torch.testing.assert_close(student, there)
    other, there = planes(draw(60, 7, seed=2), teacher)
    assert other.shape == there.shape == (60, 2) and not torch.allclose(other, there, atol=0.1)


def test_projection_of_one_dimension_and_of_equal_embeddings():
    assert planes(draw(9, 1), draw(9, 3))[0].shape == (9, 2)
    assert planes(torch.ones(9, 4), draw(9, 3))[0].isfinite().all()
