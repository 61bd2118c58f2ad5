"""The metrics of the `evaluate` library: equal to their functions, offline, and what the evaluator calls."""

import os
import socket

import evaluate
import pytest
import torch

import coss_hf.evaluation as library
from coss_hf.evaluation import hf_metrics
from coss_hf.evaluation.hf_metrics import KNNAccuracy, LinearProbe, MeanCosine, NeighborOverlap, Retrieval
from tests.helpers.processes import run as run_program
from tests.helpers.runs import ROOT

FOLDER = ROOT / "coss_hf" / "evaluation" / "metrics"
METRICS = {
    "knn_accuracy": KNNAccuracy,
    "linear_probe": LinearProbe,
    "mean_cosine": MeanCosine,
    "neighbor_overlap": NeighborOverlap,
    "retrieval": Retrieval,
}


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
    return {"train_features": x[:120], "train_labels": labels[:120]}, x[120:], labels[120:]


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


def test_retrieval_equals_the_function(data, tmp_path):
    train, student, labels = data
    gallery = {"gallery": train["train_features"], "gallery_labels": train["train_labels"]}
    metric = Retrieval(cache_dir=str(tmp_path))
    expected = library.retrieval(student, labels, *gallery.values())
    assert list(expected) == ["recall1", "recall10", "map"] and 0 < expected["map"] < 1
    assert metric.compute(predictions=student, references=labels, **gallery) == expected
    assert metric.compute(predictions=student.tolist(), references=labels.tolist(), **gallery) == expected
    for start in range(0, len(student), 25):
        rows = slice(start, start + 25)
        metric.add_batch(predictions=student[rows], references=labels[rows])
    one = metric.compute(k=5, **gallery)
    assert one == library.retrieval(student, labels, *gallery.values(), ks=(5,))


def test_paired_metrics_equal_the_functions(data, teacher, tmp_path):
    _, student, _ = data
    result = NeighborOverlap(cache_dir=str(tmp_path)).compute(predictions=student, references=teacher[:, :5])
    assert result == {"overlap10": library.neighbor_overlap(student, teacher[:, :5], 10)}
    result = MeanCosine(cache_dir=str(tmp_path)).compute(predictions=student, references=teacher)
    assert result == {"cosine": library.mean_cosine(student, teacher)}
    result = MeanCosine(cache_dir=str(tmp_path)).compute(predictions=student.tolist(), references=teacher.tolist())
    assert result == {"cosine": pytest.approx(library.mean_cosine(student, teacher))}


def test_tensors_are_neither_converted_nor_written(tmp_path):
    train_features = torch.randn(2, 3, dtype=torch.float64)
    test_features = torch.randn(2, 3, dtype=torch.float64)
    seen = []
    metric = KNNAccuracy(cache_dir=str(tmp_path))
    metric._compute = lambda *inputs, **options: seen.append((*inputs, *options.values()))
    labels = torch.tensor([0, 1])
    metric.compute(predictions=test_features, references=labels, train_features=train_features, train_labels=labels)
    wanted = (test_features, labels, train_features, labels)
    assert all(given is tensor for given, tensor in zip(seen[0], wanted, strict=True))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


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


def test_inputs_added_before_count_with_tensors_of_the_last_call(data, tmp_path):
    train, student, labels = data
    metric = KNNAccuracy(cache_dir=str(tmp_path))
    metric.add_batch(predictions=student[:50], references=labels[:50])
    result = metric.compute(predictions=student[50:], references=labels[50:], **train)
    assert result == library.knn_accuracy(*train.values(), student, labels, (20,))


@pytest.mark.parametrize("name", METRICS)
def test_metrics_have_descriptions(name, tmp_path):
    info = METRICS[name](cache_dir=str(tmp_path)).info
    assert info.description and info.citation.startswith("@") and info.reference_urls
    assert "predictions" in info.inputs_description and "Returns" in info.inputs_description


def test_error_names_the_invalid_input(data, tmp_path):
    train, student, labels = data
    with pytest.raises(ValueError, match="k=121 must be between 1 and 120"):
        KNNAccuracy(cache_dir=str(tmp_path)).compute(predictions=student, references=labels, k=121, **train)
    with pytest.raises(ValueError, match="same dimension"):
        MeanCosine(cache_dir=str(tmp_path)).compute(predictions=student, references=student[:, :3])


def test_every_metric_has_a_folder_to_load():
    assert sorted(path.parent.name for path in FOLDER.glob("*/*.py") if path.stem == path.parent.name) == [*METRICS]


PROGRAM = """
import socket
import sys

def refuse(*args, **kwargs):
    raise OSError("a metric reached for the network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse
import evaluate
import torch
from coss_hf.evaluation import knn_accuracy, linear_probe, retrieval

folder, cache = sys.argv[1:]
names = ["knn_accuracy", "linear_probe", "mean_cosine", "neighbor_overlap", "retrieval"]
metrics = {name: evaluate.load(f"{folder}/{name}", cache_dir=cache) for name in names}
assert [metric.name for metric in metrics.values()] == names
draw = torch.Generator().manual_seed(0)
train, test = torch.randn(60, 4, generator=draw), torch.randn(40, 4, generator=draw)
train_labels, labels = torch.randint(3, (60,), generator=draw), torch.randint(3, (40,), generator=draw)
both = evaluate.combine([metrics["knn_accuracy"], metrics["linear_probe"]])
for rows in torch.arange(40).split(15):
    both.add_batch(predictions=test[rows], references=labels[rows])
    metrics["retrieval"].add_batch(predictions=test[rows], references=labels[rows])
found = both.compute(train_features=train, train_labels=train_labels)
assert found["knn20"] == knn_accuracy(train, train_labels, test, labels)["knn20"]
assert found["probe"] == linear_probe(train, train_labels, test, labels)["accuracy"]
found = metrics["retrieval"].compute(gallery=train, gallery_labels=train_labels)
assert found == retrieval(test, labels, train, train_labels)
assert 0 <= metrics["neighbor_overlap"].compute(predictions=test, references=test + 0.1)["overlap10"] <= 1
assert abs(metrics["mean_cosine"].compute(predictions=test, references=test)["cosine"] - 1) < 1e-6
print("loaded")
"""


def test_metrics_are_loaded_by_path_without_the_network(tmp_path):
    """In a process and with caches of its own, from another folder, as somebody else would."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = ["-c", PROGRAM, FOLDER, tmp_path / "cache"]
    result = run_program(command, cwd=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "loaded"


def test_the_evaluation_calls_the_metrics(data, teacher, monkeypatch):
    """Its figures are what the metrics return, of the very tensors."""
    train, student, labels = data
    calls = []

    def spy(metric):
        original = metric.compute

        def compute(self, *, predictions=None, references=None, **options):
            """Usage."""
            calls.append((type(self).__name__, predictions, references))
            result = original(self, predictions=predictions, references=references, **options)
            return {name: value + 10 for name, value in result.items()}

        monkeypatch.setattr(metric, "compute", compute)

    inputs = {"test_labels": labels, "teacher_gallery": train["train_features"].flip(1), **train}
    plain = library.evaluate_embeddings(student, teacher, **inputs)
    for metric in (hf_metrics.KNNAccuracy, hf_metrics.LinearProbe, hf_metrics.Retrieval):
        spy(metric)
    found = library.evaluate_embeddings(student, teacher, **inputs)
    assert [name for name, *_ in calls] == ["KNNAccuracy", "LinearProbe", "Retrieval", "Retrieval"]
    assert all(predictions is student and references is labels for _, predictions, references in calls)
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        assert found[name] == (value if name in ("overlap10", "cosine") else value + 10), name


def test_the_evaluation_imports_the_library_only_where_labels_exist():
    program = (
        "import sys, torch; from coss_hf.evaluation import evaluate_embeddings; x = torch.randn(30, 4); "
        "evaluate_embeddings(x, x, train_features=x, diagnostics=True); print('evaluate' in sys.modules); "
        "y = torch.zeros(30, dtype=torch.long); "
        "evaluate_embeddings(x, x, train_features=x, train_labels=y, test_labels=y); print('evaluate' in sys.modules)"
    )
    result = run_program(["-c", program])
    assert result.stdout.split() == ["False", "True"]
