"""Recall and mean average precision of retrieval."""

import pytest
import torch

from coss_hf.evaluation.embeddings import evaluate_embeddings
from coss_hf.evaluation.retrieval import retrieval


def by_definition(queries, labels, gallery, gallery_labels, k):
    """One query at a time, with loops."""
    recalls, averages = [], []
    for query, label in zip(queries, labels):
        cosines = torch.nn.functional.cosine_similarity(gallery, query[None])
        right = [int(gallery_labels[i] == label) for i in sorted(range(len(gallery)), key=lambda i: -cosines[i])]
        if not sum(right):
            continue
        recalls.append(any(right[:k]))
        averages.append(sum(sum(right[: i + 1]) / (i + 1) for i, r in enumerate(right) if r) / sum(right))
    return sum(recalls) / len(recalls), sum(averages) / len(averages)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    labels = torch.randint(0, 5, (40,), generator=generator)
    # Class 4 is in no gallery image.
    return draw(40, 6), labels, draw(30, 6), torch.randint(0, 4, (30,), generator=generator)


@pytest.mark.parametrize("k", [1, 3, 30])
def test_recall_and_precision_equal_their_definition(rows, k):
    assert (rows[1] == 4).any()
    found = retrieval(*rows, ks=(k,), chunk=7)
    assert (found[f"recall{k}"], found["map"]) == pytest.approx(by_definition(*rows, k), abs=1e-12)


def test_average_precision_of_best_and_worst_ranking():
    gallery = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    queries = torch.tensor([[1.0, 0.05], [0.05, 1.0]])
    perfect = retrieval(queries, torch.tensor([0, 1]), gallery, torch.tensor([0, 0, 1, 1]), ks=(1,))
    assert perfect == {"recall1": 1.0, "map": 1.0}
    worst = retrieval(queries, torch.tensor([1, 0]), gallery, torch.tensor([0, 0, 1, 1]), ks=(1,))
    assert worst == {"recall1": 0.0, "map": pytest.approx((1 / 3 + 2 / 4) / 2)}


def test_queries_are_drawn_with_a_fixed_seed(rows):
    some = [retrieval(*rows, max_queries=10) for _ in range(2)]
    assert some[0] == some[1] != retrieval(*rows)


def test_retrieval_is_none_without_relevant_gallery_images(rows):
    queries, _, gallery, gallery_labels = rows
    found = retrieval(queries, torch.full((40,), 9), gallery, gallery_labels)
    assert found == {"recall1": 0.0, "recall10": 0.0, "map": 0.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ks": (31,)}, "ks between 1 and the 30 gallery images"),
        ({"ks": ()}, "ks between 1"),
        ({"query_labels": torch.zeros(3, dtype=torch.long)}, "query_labels must hold one class"),
        ({"gallery": torch.zeros(30, 5)}, "queries and gallery must be embeddings"),
        ({"queries": torch.zeros(0, 6), "query_labels": torch.zeros(0, dtype=torch.long)}, "needs queries \\(got 0\\)"),
    ],
)
def test_invalid_retrieval_input_is_rejected(rows, change, message):
    given = dict(zip(("queries", "query_labels", "gallery", "gallery_labels"), rows)) | change
    with pytest.raises(ValueError, match=message):
        retrieval(**given)


def test_symmetric_and_asymmetric_retrieval(rows):
    queries, labels, gallery, gallery_labels = rows
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    options = {"train_labels": gallery_labels, "test_labels": labels, "train_features": gallery @ turn}
    # The student's space is the teacher's, turned; its head turns it back.
    found = evaluate_embeddings(
        queries @ turn, queries, projected=queries @ turn @ turn.T, teacher_gallery=gallery, **options
    )
    for name, value in retrieval(*rows).items():
        assert found[name] == pytest.approx(value, abs=1e-9)
        assert found[f"asymmetric_{name}"] == pytest.approx(value, abs=1e-9)
    without = evaluate_embeddings(queries @ turn, queries, teacher_gallery=gallery, **options)
    assert without["map"] == pytest.approx(found["map"])
    assert without["asymmetric_map"] != pytest.approx(found["map"], abs=1e-3)


def test_no_retrieval_without_a_teacher_gallery(rows):
    queries, labels, gallery, gallery_labels = rows
    found = evaluate_embeddings(
        queries, queries, train_features=gallery, train_labels=gallery_labels, test_labels=labels
    )
    assert not [name for name in found if "recall" in name or "map" in name]
