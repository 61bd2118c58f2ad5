import json
from types import SimpleNamespace

import pytest
import torch

import coss_hf.reporting.run_report as report
from coss_hf.data.loading import load_images
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.run_record import command, write_json
from tests.helpers.runs import save_resnet


def test_the_picture_shows_the_nearest_images(tmp_path, image_parquet, monkeypatch):
    teacher, student = (load_backbone(save_resnet(tmp_path / name, seed)) for seed, name in enumerate(("t", "s")))
    splits = load_images(str(image_parquet))
    evaluator = Evaluator(teacher, splits.test, "image")
    shown = []
    monkeypatch.setattr(report, "neighbor_picture", lambda path, images, *rows: shown.extend(rows))
    trainer = SimpleNamespace(student=student, state=SimpleNamespace(log_history=[]))
    examples, flat = report.write_pictures(tmp_path, trainer, evaluator, queries=4, neighbors=3, points=20)
    queries, *found = shown
    assert examples.queries == queries and set(examples.images) >= {*queries, *found[0].ravel().tolist()}
    assert flat["student"].shape == flat["teacher"].shape == (20, 2) and flat["labels"] is None
    assert (tmp_path / "projection.png").exists() and not (tmp_path / "loss.png").exists()
    assert queries == [0, 8, 15, 23]
    for network, rows in zip((student, teacher), found, strict=True):
        unit = torch.nn.functional.normalize(evaluator.embed(network, splits.test, ""), dim=1)
        cosines = (unit @ unit.T).fill_diagonal_(-2)[queries]
        assert torch.equal(torch.as_tensor(rows), cosines.topk(3).indices)


def test_json_is_written_atomically(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_json(path, {"x": 1})
    try:
        write_json(path, {1j: 2})
    except TypeError:
        pass
    assert json.loads(path.read_text()) == {"x": 1} and len(list(path.parent.iterdir())) == 1


def results(student: float, key: str = "knn20") -> dict:
    return {name: {key: value} for name, value in (("teacher", 0.9), ("student", student), ("random", 0.5))}


def test_summary_of_a_run():
    (sentence,) = report.summary(results(0.8), [], [])
    assert sentence.startswith(
        "The student has learnt from its teacher: k-NN 20 accuracy 80.0 %, at random weights 50.0 %"
    )
    (sentence,) = report.summary(results(0.5), [], [])
    assert sentence.startswith("It did not help: the student is no better than at random weights: k-NN 20")
    (sentence,) = report.summary(results(0.8, "overlap10"), [], [])
    assert sentence.endswith("in common with its teacher 80.0 %, at random weights 50.0 %.")
    assert report.summary({}, [], []) == []
    panel = {
        "images_seen": 0,
        "eval_overlap10": 0.1,
        "eval_effective_rank": 9,
        "eval_dead_dimensions": 0,
        "eval_duplicates": 0,
    }
    panel |= {"eval_teacher_effective_rank": 10, "eval_teacher_duplicates": 0}
    assert report.summary({}, [], ["alarm"]) == ["alarm"]
    flat = report.summary(results(0.8), [panel, dict(panel)], ["alarm"])
    assert len(flat) == 2 and flat[1] == "alarm"
    assert flat[0].startswith("The student is better than at random weights, but something is wrong")
    # Better than at random weights, worse than its own that it started from.
    history = [panel | {"eval_knn20": 0.85}, panel | {"eval_overlap10": 0.3, "eval_knn20": 0.8}]
    (sentence,) = report.summary(results(0.8), history, [])
    assert sentence.startswith("It did not help: on the images evaluated") and "(80.0 %, before 85.0 %)" in sentence
    (sentence,) = report.summary(results(0.8), history[::-1][:1] + [history[0] | {"eval_overlap10": 0.5}], [])
    assert sentence.startswith("The student has learnt from its teacher")


@pytest.mark.parametrize(
    ("environment", "accelerator", "launcher"),
    [
        ({}, False, "python"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False, "accelerate launch"),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "2"},
            True,
            "accelerate launch --num_processes 2 --mixed_precision bf16",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"},
            False,
            "accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2",
        ),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False, "torchrun --standalone --nproc_per_node 2"),
        (
            {"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"},
            True,
            "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:PORT --nproc_per_node 8",
        ),
    ],
)
def test_the_command_says_how_it_was_launched(monkeypatch, environment, accelerator, launcher):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: accelerator)
    for name in ("ACCELERATE_MIXED_PRECISION", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("coss_hf.reporting.run_record.LAUNCHED", "ACCELERATE_MIXED_PRECISION" in environment)
    monkeypatch.setattr("sys.argv", ["recipes/distill.py", "--hub_token", "secret", "--seed=1"])
    assert command() == f"{launcher} recipes/distill.py --hub_token '***' --seed=1"


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_names_its_configuration(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("coss_hf.reporting.run_record.LAUNCHED", True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr("sys.argv", ["recipes/distill.py", "--use_cpu"])
    started = "accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2"
    assert command() == f"{started} recipes/distill.py --use_cpu"


def test_a_verdict_says_on_how_many_images_it_rests():
    first, few = report.summary(results(0.8), [], [], evaluated=60)
    assert first.startswith("The student has learnt") and few.startswith("This is measured on 60 images alone")
    (sentence,) = report.summary(results(0.8, "overlap10"), [], [], evaluated=2000)
    assert sentence.endswith("(on 2,000 images, where 0.5 % would be chance).")
    unsaid, _ = report.summary(results(0.5), [], [], evaluated=20)
    assert unsaid.startswith("20 images are too few to tell whether it helped, which takes 50 or more: k-NN 20")


def test_only_good_news_looks_like_it(tmp_path):
    trainer = SimpleNamespace(identity=lambda: {})
    record = {"results": {}, "images_seen": 8, "teacher": "t", "student": "s", "versions": {}, "arguments": {}}
    record |= {"command": "c", "verdict": ["learnt", f"{report.FAILED}: x", "fell"], "alarms": ["fell"]}
    report.write_page(tmp_path, trainer, record)
    text = (tmp_path / "report.html").read_text()
    assert "<p class=lead>learnt" in text
    assert f"<p class=alarm>{report.FAILED}" in text and "<p class=alarm>fell" in text
