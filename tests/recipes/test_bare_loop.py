import json
import math
import os

import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, get_cosine_schedule_with_warmup

import tests.helpers.runs as h
from coss_hf.models.cifar.configuration_cifar_resnet import CifarResNetConfig
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetForImageClassification


@pytest.fixture
def bare_loop(monkeypatch):
    return h.load_benchmark("bare_loop", monkeypatch)


def test_views_are_crops_and_flips(bare_loop):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8, generator=generator)
    corner, flip = torch.randint(9, (16, 2), generator=generator), torch.arange(16) % 2 == 0
    for image, (y, x), flipped, found in zip(images, corner, flip, bare_loop.views(images, corner, flip)):
        expected = F.pad(image, (4, 4, 4, 4))[:, y : y + 32, x : x + 32]
        assert torch.equal(found, expected.flip(2) if flipped else expected)


def test_learning_rate_is_that_of_transformers(bare_loop):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.05 * 90), 90)
    for step in range(90):
        assert bare_loop.learning_rate(step, 90) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_loss_is_that_of_the_definition(bare_loop):
    student, teacher = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = sum(student[i] @ teacher[i] / student[i].norm() / teacher[i].norm() for i in range(8)) / 8
    columns = sum(s @ t / s.norm() / t.norm() for s, t in zip(student.T, teacher.T)) / 5
    torch.testing.assert_close(bare_loop.coss(student, teacher), -rows - 0.5 * columns)


def test_interrupted_run_ends_as_an_uninterrupted_one(bare_loop, shared, tmp_path, monkeypatch):
    CifarResNetForImageClassification(CifarResNetConfig(depth=8)).save_pretrained(tmp_path / "teacher")
    table = pyarrow.parquet.read_table(shared / "data" / "cifar10" / "test.parquet").slice(0, 16)
    pyarrow.parquet.write_table(table, tmp_path / "images.parquet")
    monkeypatch.setattr(bare_loop, "CHECKPOINT_STEPS", 5)

    def run(name: str, *more: str) -> None:
        paths = {"--teacher": "teacher", "--train_parquet": "images.parquet", "--output": name}
        arguments = [text for flag, path in paths.items() for text in (flag, str(tmp_path / path))]
        bare_loop.main([*arguments, "--seed", "3", "--num_images", "36", "--batch_size", "4", *more])

    def interrupt(source, target):
        os.rename(source, target)
        raise KeyboardInterrupt

    run("whole", "--save_init", str(tmp_path / "initial"))
    with monkeypatch.context() as patch:
        patch.setattr(bare_loop.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("resumed")
    run("resumed")
    run("given", "--student", str(tmp_path / "initial"))

    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for name in ("resumed", "given"):
        other = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(whole[key], other[key]) for key in whole)
    initial = AutoModel.from_pretrained(tmp_path / "initial")
    expected = bare_loop.initial_student(3).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in initial.state_dict().items())
    assert not torch.equal(whole["conv1.weight"], expected["conv1.weight"])

    log = json.loads((tmp_path / "whole" / "train_log.json").read_text())
    assert log["steps"] == 9 and -1.5 <= log["last_epoch_loss_over_beta"] <= 1.5
    before = (tmp_path / "whole" / "model.safetensors").stat().st_mtime_ns
    run("whole")
    assert (tmp_path / "whole" / "model.safetensors").stat().st_mtime_ns == before
