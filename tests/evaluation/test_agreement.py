import pytest
import torch

from coss_hf.evaluation.agreement import (
    dead_share,
    dimension_cosine,
    duplicate_share,
    effective_rank,
    linear_cka,
    mean_cosine,
    neighbor_overlap,
)


def embeddings(n: int = 300, d: int = 16, seed: int = 0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_overlap_of_a_network_with_itself_is_one():
    x = embeddings()
    assert neighbor_overlap(x, x) == 1.0
    rotation = torch.linalg.qr(embeddings(16, seed=1).double())[0]
    assert neighbor_overlap(3 * x.double() @ rotation, x.double()) == 1.0


def test_overlap_of_unrelated_networks_is_chance():
    assert neighbor_overlap(embeddings(600), embeddings(600, d=7, seed=1)) == pytest.approx(10 / 599, abs=0.005)


@pytest.mark.parametrize("chunk", [7, 1024])
def test_overlap_equals_brute_force(chunk):
    student, teacher = embeddings(80).double(), embeddings(80).double()[:, :9]

    def sets(x):
        cosine = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
        return [
            set(sorted((j for j in range(len(x)) if j != i), key=lambda j: -row[j])[:5])
            for i, row in enumerate(cosine.tolist())
        ]

    expected = sum(len(s & t) for s, t in zip(sets(student), sets(teacher), strict=True)) / (5 * 80)
    assert 0.2 < expected < 0.9
    assert neighbor_overlap(student, teacher, k=5, chunk=chunk) == pytest.approx(expected, abs=1e-12)


def test_overlap_leaves_self_out_by_index():
    pairs = torch.eye(4).repeat_interleave(2, 0)  # every image has an exact duplicate
    strangers = torch.eye(8)[:, [0, 1, 2, 3, 4, 5, 6, 7]] + 0.1 * torch.eye(8).roll(2, 0)
    assert neighbor_overlap(pairs, pairs.clone(), k=1) == 1.0
    assert neighbor_overlap(pairs, strangers, k=1) == 0.0  # self counted as a neighbour would be shared


def test_cosine_equals_torch_cosine_similarity():
    x = embeddings()
    assert mean_cosine(x, 5 * x) == pytest.approx(1, abs=1e-6)
    assert mean_cosine(x, -x) == pytest.approx(-1, abs=1e-6)
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 9.0], [1.0, 1.0]])
    assert mean_cosine(student, teacher) == pytest.approx((0.6 + 1 + 0) / 3)


def test_invalid_embeddings_are_rejected():
    x = embeddings(10)
    with pytest.raises(ValueError, match="k=10 must be between 1 and 9"):
        neighbor_overlap(x, x)
    with pytest.raises(ValueError, match="student has 10 rows and teacher 9"):
        neighbor_overlap(x, x[:9], k=3)
    with pytest.raises(ValueError, match="student has 9 rows and teacher 10"):
        mean_cosine(x[:9], x)
    with pytest.raises(ValueError, match=r"same dimension.*\(10, 16\) and \(10, 4\)"):
        mean_cosine(x, x[:, :4])
    with pytest.raises(ValueError, match="no embeddings"):
        mean_cosine(x[:0], x[:0])


def test_cosine_of_dimensions():
    x, y = embeddings(50), embeddings(50, seed=1)
    expected = torch.nn.functional.cosine_similarity(x, y, dim=0).mean().item()
    assert dimension_cosine(x, y) == pytest.approx(expected, abs=1e-6)
    assert dimension_cosine(x * torch.rand(16), x) == pytest.approx(1, abs=1e-6), "a scale of each does not matter"
    with pytest.raises(ValueError, match="same dimension"):
        dimension_cosine(x, y[:, :3])


def test_cka_ignores_rotation_scale_and_shift_and_equals_its_kernel_form():
    x, y = embeddings(60).double(), embeddings(60, d=5, seed=1).double()
    rotation = torch.linalg.qr(embeddings(16, seed=2).double())[0]
    assert linear_cka(3 * x @ rotation + 7, x) == pytest.approx(1, abs=1e-12)
    centre = torch.eye(60, dtype=torch.float64) - 1 / 60
    k, m = (centre @ (z @ z.T) @ centre for z in (x, y))
    assert linear_cka(x, y) == pytest.approx(((k * m).sum() / (k.norm() * m.norm())).item(), abs=1e-12)
    assert linear_cka(x, torch.ones(60, 3)) == 0.0
    with pytest.raises(ValueError, match="two images"):
        linear_cka(x[:1], y[:1])


def test_effective_rank_counts_directions():
    x = torch.linalg.qr(embeddings(300, 8).double() - embeddings(300, 8).double().mean(0))[0]
    assert effective_rank(x) == pytest.approx(8, abs=1e-6)
    assert effective_rank(torch.cat([x, torch.zeros(300, 5)], 1) * 100 + 3) == pytest.approx(8, abs=1e-6)
    assert effective_rank(x[:, :1] @ torch.ones(1, 7).double()) == pytest.approx(1, abs=1e-6)
    assert effective_rank(torch.full((300, 7), 0.1)) == 0.0
    assert effective_rank(x * torch.tensor([1, 1, 1, 1, 1e-3, 1e-3, 1e-3, 1e-3])) < 4.1


def test_duplicates_share_a_direction_or_have_none():
    x = embeddings(50)
    assert duplicate_share(x) == 0
    x[[3, 7]] = 2 * x[[4, 8]]
    assert duplicate_share(x) == pytest.approx(4 / 50)
    x[20] = 0
    assert duplicate_share(x) == pytest.approx(4 / 50), "one without a direction is like no other"
    x[30:35] = 0
    assert duplicate_share(x) == pytest.approx(10 / 50)
    assert duplicate_share(torch.zeros(6, 3)) == 1.0, "a collapsed network"
    assert duplicate_share(torch.zeros(1, 3)) == 0.0


def test_dead_dimensions_are_constant_ones():
    x = embeddings(50, 8)
    x[:, 2], x[:, 5] = 0, 3.7
    assert dead_share(x) == 2 / 8 and dead_share(torch.ones(5, 3)) == 1.0 and dead_share(torch.zeros(5, 3)) == 1.0
