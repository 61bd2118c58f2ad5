"""On a GPU only: mixed precision, and a teacher in half precision."""

import pytest
import torch

import tests.helpers as h

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}, {"bf16": True, "torch_compile": True}])
def test_mixed_precision(tmp_path, image_parquet, precision):
    teacher, student = h.save_resnet(tmp_path / "teacher", 1), h.save_vit(tmp_path / "student", 2)
    options = {"use_cpu": False, "max_steps": 12, "logging_steps": 4, "learning_rate": 0.005}
    trainer = h.make_trainer(tmp_path, image_parquet, teacher, student, **options, **precision)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.student.model.parameters())


def test_same_run_as_on_the_cpu(tmp_path, image_parquet):
    teacher, student = h.save_resnet(tmp_path / "teacher", 1), h.save_vit(tmp_path / "student", 2)
    losses = []
    for use_cpu in (True, False):
        trainer = h.make_trainer(tmp_path, image_parquet, teacher, student, use_cpu=use_cpu, tf32=False, max_steps=4)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
