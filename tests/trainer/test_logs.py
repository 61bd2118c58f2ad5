import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tests.helpers.runs as h
from coss_hf.losses.registry import LOSSES
from coss_hf.utils.errors import NonFiniteLoss


def test_length_in_images_counts_neighbours(tmp_path, image_parquet, networks):
    import numpy as np

    neighbors = np.array([[(i + j) % 48 for j in range(1, 6)] for i in range(48)], dtype=np.int32)
    options = {"neighbors_k": 2, "neighbors_pool": 5, "num_images": 100, "max_steps": -1}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, neighbors=neighbors, **options)
    recorder = h.Recorder(trainer)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.images_seen == 96  # 4 steps of 8 anchors x 3
    for batch in recorder.batches:
        groups = batch["index"].view(8, 3)
        assert all(set(g[1:]) <= set(neighbors[g[0]]) for g in groups.tolist())


def test_images_seen_where_the_last_step_of_an_epoch_is_short(tmp_path, image_parquet, networks):
    options = {"gradient_accumulation_steps": 4, "num_images": 112, "max_steps": -1}  # 6 batches of 8 an epoch
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    recorder = h.Recorder(trainer)
    trainer.train()
    # Steps of 4, 2, 4 batches are 80 images; the next of 2 is 96, one of 4 more would be 128.
    assert trainer.state.global_step == 4
    assert trainer.images_seen == sum(len(batch["index"]) for batch in recorder.batches) == 96


def test_logs(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["images_seen"] for line in lines] == [16, 32, 48]
    for line in lines:
        assert line["loss"] == pytest.approx(50 * (line["l_co"] + line["l_ss"]), rel=1e-4)
        assert line["cosine_sample"] == pytest.approx(-line["l_co"])
        assert line["cosine_dimension"] == pytest.approx(-line["l_ss"])
        assert line["learning_rate"] >= 0
        assert line["images_per_second"] > 0


class Poisoned(nn.Module):
    """CoSS that turns NaN at its third call."""

    def __init__(self):
        super().__init__()
        self.coss, self.calls = LOSSES["coss"](), 0

    def forward(self, student, teacher, index):
        self.calls += 1
        output = self.coss(student, teacher, index)
        return {**output, "loss": output["loss"] * (float("nan") if self.calls == 3 else 1)}


@pytest.mark.parametrize("options", [{"logging_steps": 2}, {"logging_steps": 3, "logging_first_step": True}])
def test_the_gradient_norm_is_taken_where_it_is_logged(tmp_path, image_parquet, networks, monkeypatch, options):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    steps, norm = [], trainer.accelerator.clip_grad_norm_

    def spy(*args, **kwargs):
        steps.append(trainer.state.global_step + 1)
        return norm(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", spy)
    trainer.train()
    assert steps == [line["step"] for line in trainer.state.log_history if "grad_norm" in line]
    assert steps == ([1, 3, 6] if "logging_first_step" in options else [2, 4, 6])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(
        tmp_path,
        image_parquet,
        networks.teacher,
        networks.resnet,
        criterion=Poisoned(),
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(NonFiniteLoss, match=r"nan at step 3.*row \d+"):
        trainer.train()
    kept = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2"]
    assert all(t.isfinite().all() for t in load_file(tmp_path / "out/checkpoint-2/model.safetensors").values())


class NotANumber(nn.Module):
    """CoSS to which the embedding of one image is given as NaN."""

    def __init__(self, row: int):
        super().__init__()
        self.coss, self.row = LOSSES["coss"](), row

    def forward(self, student, teacher, index):
        student.embedding.data[index == self.row] = float("nan")
        return self.coss(student, teacher, index)


def test_the_images_to_blame_are_named(tmp_path, image_parquet, networks):
    """The loss of the whole epoch, in micro-batches, is NaN for all of them: only the image's own features tell."""
    options = {"max_steps": 1, "gradient_accumulation_steps": 6, "criterion": NotANumber(17)}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    with pytest.raises(NonFiniteLoss, match="at step 1; .* Images whose features are not finite: .*row 17. Lower"):
        trainer.train()


def test_fewer_images_than_a_batch(tmp_path, image_parquet, networks):
    with pytest.raises(ValueError, match="per_device_train_batch_size=64.*48 images"):
        h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, per_device_train_batch_size=64)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("inf"))
    with pytest.raises(NonFiniteLoss, match="not finite"):
        trainer.save_model()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_seed_gives_one_head_whatever_was_drawn_before(tmp_path, image_parquet, networks):
    heads = []
    for draws in (0, 5):
        torch.rand(draws)
        heads.append(
            h.state(h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small))["head.0.weight"]
        )
    assert torch.equal(*heads)


def test_a_run_without_a_head_leaves_none_of_an_earlier_one(tmp_path, image_parquet, networks):
    h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small).save_model()
    assert (tmp_path / "out" / "head.safetensors").exists()
    h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet).save_model()
    assert not (tmp_path / "out" / "head.safetensors").exists()


def test_half_precision_students_and_teachers(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, max_steps=2)
    trainer.teacher.model.bfloat16()
    trainer.student.model.bfloat16()
    trainer.train()
    assert trainer.state.log_history[0]["loss"] < 0


def test_activation_checkpointing_reaches_the_student(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, gradient_checkpointing=True)
    trainer.train()
    assert trainer.student.model.is_gradient_checkpointing


def test_the_teacher_runs_under_autocast(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, bf16=True, max_steps=1)
    seen = []
    trainer.teacher.model.conv1.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.train()
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_wrapper_is_what_trainer_must_see(tmp_path, image_parquet, networks):
    model = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet).model
    assert model.main_input_name == "pixel_values" and model.accepts_loss_kwargs is False
    assert not hasattr(model, "config")


@pytest.mark.slow
def test_compiled_student_is_saved_with_clean_keys(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, networks.resnet, torch_compile_backend="eager", max_steps=2
    )
    trainer.train()
    trainer.save_model()
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == load_file(f"{networks.resnet}/model.safetensors").keys()


def test_model_card_needs_no_configuration_of_the_wrapper(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    trainer.create_model_card()
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()
