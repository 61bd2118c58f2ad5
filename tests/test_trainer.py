import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, TrainerCallback

import tests.helpers as h
from coss_hf.config import DistillationArguments
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.images import load_images
from coss_hf.loading import load_backbone
from coss_hf.losses import LOSSES
from coss_hf.trainer import NonFiniteLoss


@pytest.fixture
def networks(tmp_path):
    return SimpleNamespace(
        teacher=h.save_resnet(tmp_path / "teacher", seed=1),
        resnet=h.save_resnet(tmp_path / "resnet", seed=2),
        small=h.save_resnet(tmp_path / "small", seed=2, hidden_sizes=(4, 4, 8)),
        vit=h.save_vit(tmp_path / "vit", seed=2),
    )


class Recorder(TrainerCallback):
    """Keeps every batch that the loss was computed from."""

    def __init__(self, trainer):
        self.batches, self.epochs = [], []
        compute = trainer.compute_loss

        def wrapped(model, inputs, **kwargs):
            self.batches.append({key: value.clone() for key, value in inputs.items()})
            self.epochs.append(trainer.train_dataset.epoch)
            return compute(model, inputs, **kwargs)

        trainer.compute_loss = wrapped


# ---- the defaults are the method's ----


def test_equals_a_plain_loop_with_the_paper_settings(tmp_path, image_parquet, networks):
    """SGD with momentum, decay on every parameter, cosine, no clipping: the weights of a hand-written loop."""
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, learning_rate=0.005)
    recorder = Recorder(trainer)
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
    trainer.train()  # 6 steps an epoch; the rate after step n is that of step n + 1
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
    assert torch.equal(before["student.pooler.dense.weight"], after["student.pooler.dense.weight"])
    assert not torch.equal(before["student.layernorm.weight"], after["student.layernorm.weight"])


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


# ---- resume ----


@pytest.mark.parametrize(("kind", "workers"), [("vit", 0), ("small", 2)])
def test_resume_is_bit_identical(tmp_path, image_parquet, networks, kind, workers):
    """In mid-epoch, with random views, for a student whose file has another key layout than its modules (ViT)."""
    options = {
        "max_steps": 9,  # 6 steps an epoch
        "save_strategy": "steps",
        "save_steps": 4,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "save_total_limit": None,
    }
    straight = h.make_trainer(tmp_path, image_parquet, networks.teacher, getattr(networks, kind), **options)
    recorder = Recorder(straight)
    straight.train()
    resumed = h.make_trainer(tmp_path, image_parquet, networks.teacher, getattr(networks, kind), **options)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1)  # nothing of these may survive
    again = Recorder(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    for first, second in zip(recorder.batches[4:], again.batches, strict=True):
        h.assert_same(first, second)
    assert recorder.epochs[4:] == again.epochs == [0, 0, 1, 1, 1]
    h.assert_same(h.state(straight), h.state(resumed))


def test_a_finished_run_is_not_trained_on(tmp_path, image_parquet, networks):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 8}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    trainer.train()
    again = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    again.train(resume_from_checkpoint="auto")
    h.assert_same(h.state(trainer), h.state(again))
    assert again.state.global_step == 8 and again.images_seen == 64


def test_half_written_checkpoints_are_passed_over(tmp_path, image_parquet, networks, capsys):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options).train()
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "epo')
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-2, step 2" in capsys.readouterr().out
    assert trainer.state.global_step == 4


def test_nothing_to_resume_is_a_fresh_start_with_one_line(tmp_path, image_parquet, networks, capsys):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, max_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert capsys.readouterr().out.count("starting afresh") == 1


def test_a_wrong_checkpoint_path_is_refused(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    with pytest.raises(ValueError, match="resume_from_checkpoint=.*nowhere"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


# ---- length, logs, failures ----


def test_length_in_images_counts_neighbours(tmp_path, image_parquet, networks):
    import numpy as np

    neighbors = np.array([[(i + j) % 48 for j in range(1, 6)] for i in range(48)], dtype=np.int32)
    options = {"neighbors_k": 2, "neighbors_pool": 5, "num_images": 100, "max_steps": -1}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, neighbors=neighbors, **options)
    recorder = Recorder(trainer)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.images_seen == 96  # 4 steps of 8 anchors x 3
    for batch in recorder.batches:
        groups = batch["index"].view(8, 3)
        assert all(set(g[1:]) <= set(neighbors[g[0]]) for g in groups.tolist())


def test_images_seen_where_the_last_step_of_an_epoch_is_short(tmp_path, image_parquet, networks):
    options = {"gradient_accumulation_steps": 4, "num_images": 112, "max_steps": -1}  # 6 batches of 8 an epoch
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    recorder = Recorder(trainer)
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


# ---- evaluation ----


def make_evaluator(splits, teacher):
    return Evaluator(
        teacher, splits.test, splits.image_column, label_column=splits.label_column, bank=splits.train, batch_size=7
    )


@pytest.mark.parametrize("student", ["small", "vit"])
def test_evaluation_reads_every_held_out_image(tmp_path, image_parquet, networks, student):
    trainer = h.make_trainer(
        tmp_path, image_parquet, networks.teacher, getattr(networks, student), evaluator=make_evaluator, max_steps=2
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_knn10", "eval_knn20", "eval_probe", "eval_overlap10", "eval_cosine", "eval_loss"} <= metrics.keys()
    images = load_images(str(image_parquet)).test
    rows = trainer.evaluator.embed(trainer.student, images, "")
    assert rows.shape == (24, trainer.student.dim)  # 24 is no multiple of the batch of 7
    bank = trainer.evaluator.embed(trainer.student, trainer.evaluator.bank, "")
    similarity = nn.functional.normalize(rows) @ nn.functional.normalize(bank).T
    values, found = similarity.topk(10)
    votes = torch.zeros(24, 4).scatter_add_(
        1, torch.tensor(trainer.evaluator.bank["label"])[found], (values / 0.07).exp()
    )
    accuracy = (votes.argmax(1) == torch.tensor(images["label"])).float().mean().item()
    assert metrics["eval_knn10"] == pytest.approx(accuracy)


def test_evaluation_without_labels_and_best_model(tmp_path, image_parquet, networks):
    """The best checkpoint comes back exactly, for a student whose file has another key layout (ViT)."""

    def agreement_only(splits, teacher):
        return Evaluator(teacher, splits.test, splits.image_column)

    trainer = h.make_trainer(
        tmp_path,
        image_parquet,
        networks.teacher,
        networks.vit,
        evaluator=agreement_only,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
        load_best_model_at_end=True,
        metric_for_best_model="overlap10",
        greater_is_better=True,
        learning_rate=1.0,  # wild enough for the best not to be the last
    )
    trainer.train()
    lines = {line["step"]: line for line in trainer.state.log_history if "eval_overlap10" in line}
    assert sorted(lines) == [2, 4, 6] and "eval_knn10" not in lines[2]
    best = max(lines, key=lambda step: lines[step]["eval_overlap10"])
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    expected = AutoModel.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    h.assert_same(expected, trainer.student.model.state_dict())


def test_a_finished_run_gives_its_best_model_again(tmp_path, image_parquet, networks):
    options = {
        "evaluator": lambda splits, teacher: Evaluator(teacher, splits.test, splits.image_column),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "load_best_model_at_end": True,
        "metric_for_best_model": "cosine",
        "greater_is_better": False,  # the first is the best
    }
    first = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    first.train()
    again = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    again.train(resume_from_checkpoint="auto")
    h.assert_same(h.state(first), h.state(again))


def test_evaluation_needs_held_out_images(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    with pytest.raises(ValueError, match="--validation_size"):
        trainer.evaluation_loop(None, "")


# ---- settings that would silently change the loss ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator_config": {"split_batches": True}}, "split_batches"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"logging_nan_inf_filter": True}, "logging_nan_inf_filter"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"per_device_train_batch_size": 1}, "batch of one image"),
        ({"num_images": 100, "max_steps": 3}, "--num_images=100 and --max_steps=3"),
        ({"neighbors_k": 4, "neighbors_pool": 3}, "--neighbors_k=4"),
        ({"method": "cos"}, "choose one of coss"),
        ({"lr_milestones": [3, 1]}, "must rise"),
        ({"dataloader_drop_last": False}, "dataloader_drop_last"),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, "batch of one image"),
        ({"eval_bank_size": 0}, "eval_bank_size"),
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
