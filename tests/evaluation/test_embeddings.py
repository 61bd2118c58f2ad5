import pytest
import torch

from coss_hf.evaluation.agreement import mean_cosine, neighbor_overlap
from coss_hf.evaluation.embeddings import evaluate_embeddings
from coss_hf.evaluation.knn import knn_accuracy
from coss_hf.evaluation.linear_probe import linear_probe
from coss_hf.evaluation.tables import table
from tests.helpers.processes import run as run_program


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (140,), generator=generator)
    teacher = torch.eye(6)[labels] + 0.5 * torch.randn(140, 6, generator=generator)
    student = teacher[:, :5] + 0.1 * torch.randn(140, 5, generator=generator)
    return student[:100], labels[:100], student[100:], labels[100:], teacher[100:]


def test_every_metric_is_that_of_its_function(data):
    train, train_labels, student, labels, teacher = data
    result = evaluate_embeddings(student, teacher, train_features=train, train_labels=train_labels, test_labels=labels)
    scores = knn_accuracy(train, train_labels, student, labels)
    assert result == {
        "knn10": scores["knn10"],
        "knn20": scores["knn20"],
        "probe": linear_probe(train, train_labels, student, labels)["accuracy"],
        "overlap10": neighbor_overlap(student, teacher, 10),
        "cosine": None,
    }
    assert 0.5 < result["knn10"] <= 1


def test_without_labels_and_through_the_head(data):
    train, _, student, labels, teacher = data
    projected = torch.nn.functional.pad(student, (0, 1))
    result = evaluate_embeddings(student, teacher, train_features=train, test_labels=labels, projected=projected)
    assert result == {
        "overlap10": neighbor_overlap(student, teacher, 10),
        "cosine": mean_cosine(projected, teacher),
    }


def test_metrics_that_need_more_images_are_none(data):
    train, train_labels, student, labels, _ = data
    arguments = {"train_features": train[:15], "train_labels": train_labels[:15], "test_labels": labels[:10]}
    result = evaluate_embeddings(student[:10], student[:10], **arguments)
    assert result["knn20"] is None and result["overlap10"] is None
    assert result["knn10"] is not None and result["cosine"] == pytest.approx(1)


def test_diagnostics_of_one_image_and_of_none(data):
    """A single image held out ended the run in the middle of an evaluation."""
    student, teacher = data[2][:1], data[4][:1, :5]
    result = evaluate_embeddings(student, teacher, diagnostics=True)
    assert result["cka"] is None and result["effective_rank"] == 0 and result["duplicates"] == 0
    assert result["cosine"] == pytest.approx(mean_cosine(student, teacher))
    assert evaluate_embeddings(student[:0], teacher[:0], diagnostics=True) == {
        "overlap10": None,
        "cosine": None,
        "dimension_cosine": None,
        "cka": None,
        "effective_rank": 0.0,
        "dead_dimensions": 0.0,
        "duplicates": 0.0,
    }


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_probe_needs_two_training_images(data, images):
    train, train_labels, student, labels, _ = data
    options = {"teacher_gallery": train[:images], "linear": True}
    result = evaluate_embeddings(
        student,
        student,
        train_features=train[:images],
        train_labels=train_labels[:images],
        test_labels=labels,
        **options,
    )
    assert (result["probe"] is None) == (images < 2) and result["knn10"] is None
    assert (result["linear"] is None) == ("map" not in result) == (images == 0)


def test_table_has_one_line_per_network():
    text = table(
        {
            "teacher": {"parameters": 853018, "knn10": 0.8498, "overlap10": 1.0, "cosine": 1.0},
            "raw pixels": {"knn10": 0.0512, "overlap10": 0.125, "cosine": None, "runtime": 3.0},
        }
    )
    assert text.splitlines() == [
        "|            | parameters | k-NN 10 | overlap 10 | cosine |",
        "|------------|-----------:|--------:|-----------:|-------:|",
        "| teacher    |    853,018 |    85.0 |      100.0 |  1.000 |",
        "| raw pixels |          - |     5.1 |       12.5 |      - |",
    ]


def test_importing_the_package_leaves_slow_libraries_alone():
    slow = "{'evaluate', 'matplotlib', 'timm', 'wandb'}"
    modules = "coss_hf.evaluation, coss_hf.reporting.plots, coss_hf.reporting.run_report"
    # As in a process that has imported none of them.
    gone = f"[sys.modules.pop(name) for name in [*sys.modules] if name.partition('.')[0] in {slow}]"
    result = run_program(["-c", f"import sys; {gone}; import {modules}; print({slow} & set(sys.modules))"])
    assert result.stdout.strip() == "set()", result.stderr
