import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, TrainerCallback

import tests.helpers.runs as h
from coss_hf import DistillationTrainer
from coss_hf.data.loading import load_images
from coss_hf.data.views import ViewDataset
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.training_args import DistillationArguments

# ---- the defaults are the method's ----


def test_equals_a_plain_loop_with_the_paper_settings(tmp_path, image_parquet, networks):
    """SGD with momentum, decay on every parameter, cosine, no clipping: the weights of a hand-written loop."""
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, learning_rate=0.005)
    recorder = h.Recorder(trainer)
    trainer.train()

    teacher, student = load_backbone(networks.teacher).freeze(), load_backbone(networks.resnet)
    student.model.train()
    optimizer = torch.optim.SGD(student.model.parameters(), 0.005, momentum=0.9, weight_decay=5e-4)
    norms = []
    for step, batch in enumerate(recorder.batches):
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * 0.5 * (1 + math.cos(math.pi * step / 6))
        with torch.no_grad():
            t = teacher.features(teacher.normalize(batch["pixel_values"])).embedding
        s = student.features(student.normalize(batch["pixel_values"])).embedding
        cosine = nn.functional.cosine_similarity
        loss = -50 * (cosine(s, t, dim=1).mean() + cosine(s, t, dim=0).mean())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.get_total_norm([p.grad for p in student.model.parameters()]).item())
        optimizer.step()
    assert max(norms) > 1, "clipping at Trainer's default would not show"
    for (name, ours), theirs in zip(student.model.state_dict().items(), trainer.student.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_weight_decay_on_matrices_leaves_norms_out(tmp_path, image_parquet, networks):
    groups = {}
    for scope in ("all", "matrices"):
        trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, weight_decay_on=scope)
        optimizer = trainer.create_optimizer()
        groups[scope] = {g["weight_decay"]: sum(p.numel() for p in g["params"]) for g in optimizer.param_groups}
        assert all(g["momentum"] == 0.9 for g in optimizer.param_groups)
    assert groups["all"][0.0] == 0 and groups["matrices"][0.0] > 0


def test_milestones(tmp_path, image_parquet, networks):
    rates = []

    class Rates(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = h.make_trainer(
        tmp_path,
        image_parquet,
        networks.teacher,
        networks.resnet,
        max_steps=-1,
        num_train_epochs=4,
        lr_milestones=[1, 3],
        learning_rate=0.1,
    )
    trainer.add_callback(Rates())
    trainer.train()  # 6 steps per epoch; the rate after step n is that of step n + 1
    assert rates == pytest.approx([0.1] * 5 + [0.01] * 12 + [0.001] * 7)


def test_accumulated_batches_are_averaged(tmp_path, image_parquet, networks):
    """Backbones that swallow keyword arguments look to Trainer as if they scaled the loss themselves."""
    gradients = {}
    for accumulation in (1, 3):
        trainer = h.make_trainer(
            tmp_path,
            image_parquet,
            networks.teacher,
            networks.vit,
            max_steps=1,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=24 // accumulation,
            lambda_ss=0.0,  # separable: the mean over micro-batches is the mean over images
            augmentation="none",
        )
        seen = {}

        class Gradients(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, seen=seen, **kwargs):
                seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        trainer.add_callback(Gradients())
        trainer.train()
        gradients[accumulation] = seen
    for name, whole in gradients[1].items():
        torch.testing.assert_close(gradients[3][name], whole, rtol=1e-3, atol=1e-5, msg=name)


# ---- what is trained, what is published ----


def test_teacher_stays_as_it_was_and_out_of_the_folder(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    before = {name: tensor.clone() for name, tensor in trainer.teacher.model.state_dict().items()}
    student_before = h.state(trainer)
    trainer.train()
    trainer.save_model()
    h.assert_same(before, trainer.teacher.model.state_dict())
    assert any(not torch.equal(student_before[name], tensor) for name, tensor in h.state(trainer).items())
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == load_file(f"{networks.resnet}/model.safetensors").keys()


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_folder_loads_with_auto_classes_and_embeds_the_same(tmp_path, image_parquet, networks, kind):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, getattr(networks, kind))
    trainer.train()
    trainer.save_model()
    images, _ = h.colour_images(5, seed=9, size=20)
    student = trainer.student
    student.model.eval()
    with torch.no_grad():
        expected = student.features(student.preprocess(images)).embedding
        model = AutoModel.from_pretrained(tmp_path / "out").eval()
        pixels = AutoImageProcessor.from_pretrained(tmp_path / "out")(images, return_tensors="pt")
        output = model(**pixels)
    assert model.config.embedding_pooling == student.pooling
    found = output.last_hidden_state[:, 0] if kind == "vit" else output.pooler_output.flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_parameters_outside_the_embedding_are_frozen(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit)
    before = h.state(trainer)
    trainer.train()
    after = h.state(trainer)
    assert torch.equal(before["network.pooler.dense.weight"], after["network.pooler.dense.weight"])
    assert not torch.equal(before["network.layernorm.weight"], after["network.layernorm.weight"])


def test_head_is_trained_and_kept_beside_the_student(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, head_hidden_size=12)
    before = h.state(trainer)
    trainer.train()
    trainer.save_model()
    head = load_file(tmp_path / "out" / "head.safetensors")
    assert {name: tuple(t.shape) for name, t in head.items()} == {
        "0.weight": (12, 8),
        "0.bias": (12,),
        "2.weight": (16, 12),
        "2.bias": (16,),
    }
    assert not torch.equal(head["0.weight"], before["head.0.weight"])
    assert not any("head" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_student_in_half_precision_has_a_head(tmp_path, image_parquet, networks, dtype):
    """Shapes of the loss are found by an example, which went into the head as it was."""
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "use_cpu": True, "save_strategy": "no"}
    args = DistillationArguments(str(tmp_path / "out"), **options)
    student = load_backbone(networks.small, dtype=dtype)
    trainer = DistillationTrainer(networks.teacher, student, args, str(image_parquet))
    trainer.train()
    trainer.save_model()
    assert next(trainer.model.head.parameters()).dtype == torch.float32
    assert trainer.evaluate(str(image_parquet))["eval_cosine"] == pytest.approx(0, abs=1)


def test_labels_are_never_used(tmp_path, image_parquet, networks):
    weights = []
    for folder in ("with", "without"):
        import datasets

        rows = datasets.load_dataset("parquet", data_dir=str(image_parquet), cache_dir=str(tmp_path / "c"))["train"]
        rows = rows if folder == "with" else rows.remove_columns("label")
        rows.save_to_disk(tmp_path / folder)
        trainer = h.make_trainer(tmp_path, tmp_path / folder, networks.teacher, networks.resnet)
        trainer.train()
        weights.append(h.state(trainer))
    h.assert_same(*weights)


# ---- settings that would silently change the loss ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"accelerator_config": {"use_seedable_sampler": False}}, "use_seedable_sampler cannot be switched off"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"per_device_train_batch_size": 1}, "batch of one image"),
        ({"num_images": 100, "max_steps": 3}, "^num_images=100 and max_steps=3"),
        ({"neighbors_k": 4, "neighbors_pool": 3}, "^neighbors_k=4"),
        ({"method": "cos"}, "choose one of coss"),
        ({"lr_milestones": [3, 1]}, "must rise"),
        ({"dataloader_drop_last": False}, "dataloader_drop_last"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, "batch of one image"),
        ({"eval_train_size": 0}, "eval_train_size"),
    ],
)
def test_arguments_that_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def test_state_file_is_json_that_resumes(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, networks.small, save_strategy="steps", save_steps=6
    )
    trainer.train()
    folder = tmp_path / "out" / "checkpoint-6"
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 6
    assert (folder / "head.safetensors").is_file() and not (folder / "criterion.safetensors").exists()


def test_the_last_checkpoint_stays_with_a_limit_of_one(tmp_path, image_parquet, networks):
    """``Trainer`` keeps the best one alone, also where a signal has just had the last one written."""

    class Best(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                state.best_global_step = 2
                state.best_model_checkpoint = str(tmp_path / "out" / "checkpoint-2")

    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, **options)
    trainer.add_callback(Best())
    trainer.train()
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    assert trainer.args.save_total_limit == 1


def test_the_best_student_is_one_that_was_saved(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "save_steps": 30}
    args = DistillationArguments(load_best_model_at_end=True, **given)
    assert args.eval_steps == args.drawing(3).eval_steps == 30
    assert DistillationArguments(**given).eval_steps == round(50_000 / 128)


def test_what_the_user_has_frozen_is_not_trained(tmp_path, image_parquet, networks):
    student = AutoModel.from_pretrained(networks.vit)
    student.embeddings.requires_grad_(False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    options = {"use_cpu": True, "max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "no"}
    args = DistillationArguments(str(tmp_path / "out"), disable_tqdm=True, settings="paper", **options)
    splits = load_images(str(image_parquet), validation_size=0)
    DistillationTrainer(networks.teacher, student, args, splits).train()
    changed = {name.partition(".")[0] for name, value in student.state_dict().items() if not value.equal(before[name])}
    assert changed and "embeddings" not in changed


def test_a_dataset_of_views_does_not_share_a_folder_with_an_earlier_run(tmp_path, image_parquet, networks):
    options = {"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "no"}
    args = DistillationArguments(str(tmp_path / "out"), disable_tqdm=True, settings="paper", **options)
    rows = load_images(str(image_parquet), validation_size=0).train

    def trainer():
        return DistillationTrainer(networks.teacher, networks.small, args, ViewDataset(rows, "image", "cifar", 16))

    first = trainer()
    first.train()
    first.save_model()
    with pytest.raises(ValueError, match="already holds a run"):
        trainer().train()


def test_neighbours_that_nobody_would_draw_are_refused(tmp_path, image_parquet, networks):
    args = DistillationArguments(str(tmp_path / "out"), use_cpu=True)
    rows = np.zeros((48, 4), np.int64)
    with pytest.raises(ValueError, match="neighbors_k=0 draws none of them"):
        DistillationTrainer(networks.teacher, networks.small, args, str(image_parquet), neighbors=rows)
    # Of 200 images and more a tenth would be held out, whose neighbours would be too many.
    args = DistillationArguments(str(tmp_path / "out"), use_cpu=True, neighbors_k=2, per_device_train_batch_size=8)
    images = Dataset.from_dict({"image": h.colour_images(200, 0)[0]})
    rows = [[(i + 1) % 200, (i + 2) % 200] for i in range(200)]
    trainer = DistillationTrainer(networks.teacher, networks.small, args, images, neighbors=rows)
    assert len(trainer.train_dataset) == 200 and trainer.splits.validation is None
    views = ViewDataset(load_images(str(image_parquet), validation_size=0).train, "image", "cifar", 16)
    with pytest.raises(ValueError, match="a ViewDataset makes the views; give them to it"):
        DistillationTrainer(networks.teacher, networks.small, args, views, transform="cifar")


def test_reports_to_wandb_and_tensorboard(tmp_path, image_parquet, networks, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    trainer = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, networks.resnet, report_to=["wandb", "tensorboard"]
    )
    trainer.train()
    import wandb

    wandb.finish()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    board = EventAccumulator(str(next((tmp_path / "boards").rglob("events*")).parent)).Reload()
    names = {"loss", "l_co", "l_ss", "cosine_sample", "cosine_dimension", "images_seen", "images_per_second"}
    assert {f"train/{name}" for name in names} <= set(board.Tags()["scalars"])
    assert [event.value for event in board.Scalars("train/images_seen")][:3] == [16, 32, 48]
