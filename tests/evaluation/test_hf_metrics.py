import socket

import evaluate
import pytest
import torch

import coss_hf.evaluation as library
from coss_hf.evaluation.hf_metrics import KNNAccuracy, LinearProbe, MeanCosine, NeighborOverlap


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (180,), generator=generator)
    x = torch.eye(8)[labels] + 0.6 * torch.randn(180, 8, generator=generator)
    return {"bank": x[:120], "bank_labels": labels[:120]}, x[120:], labels[120:]


@pytest.fixture
def teacher(data):
    _, student, _ = data
    return student + 0.5 * torch.randn(student.shape, generator=torch.Generator().manual_seed(1))


def test_labelled_metrics_equal_the_functions(data, tmp_path):
    train, student, labels = data
    expected = library.knn_accuracy(*train.values(), student, labels, (5, 20), 0.1)
    metric = KNNAccuracy(cache_dir=str(tmp_path))
    assert metric.compute(predictions=student, references=labels, k=(5, 20), temperature=0.1, **train) == expected
    default = metric.compute(predictions=student.numpy(), references=labels.tolist(), **train)
    assert default == library.knn_accuracy(*train.values(), student, labels, (20,), 0.07)
    result = LinearProbe(cache_dir=str(tmp_path)).compute(predictions=student, references=labels, seed=2, **train)
    assert result == {"probe": library.linear_probe(*train.values(), student, labels, seed=2)["accuracy"]}


def test_paired_metrics_equal_the_functions(data, teacher, tmp_path):
    _, student, _ = data
    result = NeighborOverlap(cache_dir=str(tmp_path)).compute(predictions=student, references=teacher[:, :5])
    assert result == {"overlap10": library.neighbor_overlap(student, teacher[:, :5], 10)}
    result = MeanCosine(cache_dir=str(tmp_path)).compute(predictions=student, references=teacher)
    assert result == {"cosine": pytest.approx(library.mean_cosine(student, teacher))}


def test_batches_and_combine(data, teacher, tmp_path):
    train, student, labels = data
    agreement = evaluate.combine([NeighborOverlap(cache_dir=str(tmp_path)), MeanCosine(cache_dir=str(tmp_path))])
    quality = evaluate.combine([KNNAccuracy(cache_dir=str(tmp_path)), LinearProbe(cache_dir=str(tmp_path))])
    for s, t, y in zip(student.split(25), teacher.split(25), labels.split(25), strict=True):
        agreement.add_batch(predictions=s, references=t)
        quality.add_batch(predictions=s, references=y)
    assert agreement.compute() == {
        "overlap10": library.neighbor_overlap(student, teacher, 10),
        "cosine": pytest.approx(library.mean_cosine(student, teacher)),
    }
    assert quality.compute(**train) == {
        "knn20": library.knn_accuracy(*train.values(), student, labels)["knn20"],
        "probe": library.linear_probe(*train.values(), student, labels)["accuracy"],
    }


@pytest.mark.parametrize("metric", [KNNAccuracy, LinearProbe, NeighborOverlap, MeanCosine])
def test_described(metric, tmp_path):
    info = metric(cache_dir=str(tmp_path)).info
    assert info.description and info.citation.startswith("@") and info.reference_urls
    assert "predictions" in info.inputs_description and "Returns" in info.inputs_description


def test_bad_input_is_named(data, tmp_path):
    train, student, labels = data
    with pytest.raises(ValueError, match="k=121 must be between 1 and 120"):
        KNNAccuracy(cache_dir=str(tmp_path)).compute(predictions=student, references=labels, k=121, **train)
    with pytest.raises(ValueError, match="same dimension"):
        MeanCosine(cache_dir=str(tmp_path)).compute(predictions=student, references=student[:, :3])
