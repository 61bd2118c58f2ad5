import json
from types import SimpleNamespace

import torch

import coss_hf.report as report
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.images import load_images
from coss_hf.loading import load_backbone
from tests.helpers import save_resnet


def test_the_picture_shows_the_nearest_images(tmp_path, image_parquet, monkeypatch):
    teacher, student = (load_backbone(save_resnet(tmp_path / name, seed)) for seed, name in enumerate(("t", "s")))
    splits = load_images(str(image_parquet))
    evaluator = Evaluator(teacher, splits.test, "image")
    shown = []
    monkeypatch.setattr(report, "neighbor_picture", lambda path, images, *rows: shown.extend(rows))
    trainer = SimpleNamespace(student=student, state=SimpleNamespace(log_history=[]))
    report.write_pictures(tmp_path, trainer, evaluator, queries=4, neighbors=3)
    queries, *found = shown
    assert queries == [0, 8, 15, 23]
    for network, rows in zip((student, teacher), found, strict=True):
        unit = torch.nn.functional.normalize(evaluator.embed(network, splits.test, ""), dim=1)
        cosines = (unit @ unit.T).fill_diagonal_(-2)[queries]
        assert torch.equal(torch.as_tensor(rows), cosines.topk(3).indices)


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a" / "b.json"
    report.write_json(path, {"x": 1})
    try:
        report.write_json(path, {1j: 2})
    except TypeError:
        pass
    assert json.loads(path.read_text()) == {"x": 1} and len(list(path.parent.iterdir())) == 1
