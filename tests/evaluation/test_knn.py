import math

import pytest
import torch
from safetensors import safe_open

from coss_hf.evaluation import knn
from coss_hf.evaluation.knn import knn_accuracy, knn_predict, nearest
from coss_hf.evaluation.linear_evaluation import linear_evaluation
from coss_hf.evaluation.linear_probe import linear_probe


def clusters(n: int, d: int = 8, classes: int = 4, seed: int = 0, noise: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, d, generator=generator), labels


@pytest.fixture(scope="module")
def case(shared):
    with safe_open(shared / "fixtures" / "knn-a.safetensors", "pt") as file:
        return {key.removeprefix("c0_k20."): file.get_tensor(key) for key in file.keys()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_predictions_equal_the_fixture(case, dtype, tolerance):
    train, query, labels = case["in.bank"].to(dtype), case["in.query"].to(dtype), case["in.bank_labels"]
    pred, shares = knn_predict(train, labels, query, k=20, temperature=0.07, num_classes=10)
    assert torch.equal(pred, case["out.pred"])
    assert shares.dtype == dtype
    torch.testing.assert_close(shares.double(), case["out.class_probs"], rtol=tolerance, atol=tolerance)
    similarity, index = nearest(query, train, 20)
    assert torch.equal(index, case["out.neighbour_idx"])
    torch.testing.assert_close(similarity.double(), case["out.neighbour_sim"], rtol=tolerance, atol=tolerance)
    scores = knn_accuracy(train, labels, query, case["in.query_labels"], ks=(1, 20))
    assert scores["knn20"] == case["out.top1_percent"].item() / 100
    nearest_label = labels[case["out.neighbour_idx"][:, 0]]
    assert scores["knn1"] == (nearest_label == case["in.query_labels"]).double().mean().item()


def test_weighted_vote_equals_calculation_by_hand():
    angles = torch.tensor([0.0, 10.0, 20.0, 80.0]) * math.pi / 180
    train = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[5.0], [0.1], [1.0], [100.0]])
    _, shares = knn_predict(train, torch.tensor([0, 2, 2, 1]), torch.tensor([[3.0, 0.0]]), k=3, temperature=0.5)
    votes = [math.exp(angle.cos().item() / 0.5) for angle in angles[:3]]
    expected = torch.tensor([[votes[0], 0.0, votes[1] + votes[2]]]) / sum(votes)
    torch.testing.assert_close(shares, expected)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize(("chunk", "gallery_chunk"), [(7, 5), (1024, 65_536), (3, 65_536)])
def test_search_in_any_block_size_equals_brute_force(monkeypatch, chunk, gallery_chunk, exclude_self):
    monkeypatch.setattr(knn, "GALLERY_CHUNK", gallery_chunk)
    x = clusters(53)[0].double()
    unit = x / x.norm(dim=1, keepdim=True)
    full = unit @ unit.T
    if exclude_self:
        full.fill_diagonal_(-2.0)
    values, index = full.sort(dim=1, descending=True)
    similarity, found = nearest(x, x, 9, exclude_self=exclude_self, chunk=chunk)
    assert torch.equal(found, index[:, :9])
    torch.testing.assert_close(similarity, values[:, :9])


def test_self_is_left_out_by_index_among_duplicates():
    x = torch.eye(3).repeat_interleave(2, 0)  # rows 0 and 1 are equal, and so on
    _, index = nearest(x, x, 1, exclude_self=True)
    assert index[:, 0].tolist() == [1, 0, 3, 2, 5, 4]


def test_several_k_from_one_search_equal_single_predictions():
    (train, train_labels), (test, labels) = clusters(200, noise=3), clusters(90, seed=1, noise=3)
    scores = knn_accuracy(train, train_labels, test, labels, ks=(1, 10, 20))
    for k in (1, 10, 20):
        pred, _ = knn_predict(train, train_labels, test, k=k)
        assert scores[f"knn{k}"] == (pred == labels).double().mean().item()
    assert len(set(scores.values())) == 3  # noisy enough for k to matter


def test_knn_ignores_scale_even_of_extreme_values():
    train, labels = clusters(60)
    test = clusters(20, seed=1)[0]
    pred, shares = knn_predict(train, labels, test, k=5)
    scaled = knn_predict(train * torch.rand(60, 1).add(0.1), labels, test * 1e4, k=5)
    assert torch.equal(pred, scaled[0])
    torch.testing.assert_close(shares, scaled[1], rtol=1e-4, atol=1e-5)
    cold, cold_shares = knn_predict(train, labels, test, k=5, temperature=1e-4)
    assert torch.equal(cold, knn_predict(train, labels, test, k=1)[0])
    assert cold_shares.isfinite().all()
    assert knn_predict(train, labels, torch.zeros(2, 8), k=5)[1].isfinite().all()
    assert knn_predict(train.half(), labels, test.half(), k=5)[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 21}, "k=21 must be between 1 and 20"),
        ({"k": 0}, "k=0"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"train_labels": torch.zeros(19, dtype=torch.long)}, "train_labels.*20 embeddings"),
        ({"train_labels": torch.full((20,), -1)}, "train_labels.*unlabelled"),
        ({"train_labels": torch.zeros(20)}, "train_labels.*float32"),
        ({"test_features": torch.zeros(3, 9)}, r"\(3, 9\) and \(20, 8\)"),
        ({"num_classes": 0}, "num_classes=0 must be between 1, the largest of train_labels plus one, and 1,000,000"),
        ({"num_classes": 4, "train_labels": torch.full((20,), 4)}, "num_classes=4 must be between 5,"),
        ({"num_classes": 1_000_001}, "num_classes=1000001 must be between 1,"),
    ],
)
def test_invalid_knn_input_is_rejected(change, message):
    arguments = {"train_features": torch.randn(20, 8), "train_labels": torch.zeros(20, dtype=torch.long)}
    arguments |= {"test_features": torch.randn(3, 8), "k": 5} | change
    with pytest.raises(ValueError, match=message):
        knn_predict(**arguments)


def test_classes_without_train_images_get_no_votes():
    train, labels = clusters(20)
    assert labels.max() == 3
    shares = [knn_predict(train, labels, train, k=5, num_classes=number)[1] for number in (None, 4, 7)]
    assert torch.equal(shares[0], shares[1]) and torch.equal(shares[0], shares[2][:, :4])
    assert shares[2].shape == (20, 7) and not shares[2][:, 4:].any()


def test_accuracy_without_test_images_is_rejected():
    train, labels = clusters(20)
    with pytest.raises(ValueError, match="needs test_features"):
        knn_accuracy(train, labels, train[:0], labels[:0])
    with pytest.raises(ValueError, match="test_labels must hold"):
        knn_accuracy(train, labels, train[:3], labels[:2])


@pytest.mark.parametrize("offset", [0, 5_000_000_000])
def test_vote_table_has_one_column_per_class(offset):
    """Labels of 5,000,000,011 asked for 640 GB."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    train = torch.eye(4).repeat(10, 1) + 0.1 * torch.randn(40, 4, generator=generator)
    test = torch.eye(4).repeat(5, 1) + 0.5 * torch.randn(20, 4, generator=generator)
    numbers = torch.tensor([0, 3, 70, 11]) + offset
    for measure in (
        lambda a, b: knn_accuracy(train, a, test, b)["knn10"],
        lambda a, b: linear_probe(train, a, test, b, epochs=5)["accuracy"],
        lambda a, b: linear_evaluation(train, a, test, b, epochs=5),
    ):
        found = measure(numbers.sort().values[labels], numbers.sort().values[labels[:20]])
        assert 0.5 < found == measure(labels, labels[:20])
    unknown = labels[:20].clone()
    unknown[:10] = 9  # of no training image: wrong, whatever is answered
    assert knn_accuracy(train, labels, test, unknown)["knn10"] <= 0.5
    assert linear_probe(train, labels, test, unknown, epochs=5)["accuracy"] <= 0.5
    assert linear_evaluation(train, labels, test, unknown, epochs=5) <= 0.5
    with pytest.raises(ValueError, match="reach 5,000,000,003: number the classes from 0"):
        knn_predict(train, labels + 5_000_000_000, test)
