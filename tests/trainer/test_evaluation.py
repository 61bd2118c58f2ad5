import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModel

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.losses.coss import CoSSLoss


def make_evaluator(splits, teacher):
    return Evaluator(
        teacher,
        splits.test,
        splits.image_column,
        label_column=splits.label_column,
        train_images=splits.train,
        batch_size=7,
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
    train_features = trainer.evaluator.embed(trainer.student, trainer.evaluator.train_images, "")
    similarity = nn.functional.normalize(rows) @ nn.functional.normalize(train_features).T
    values, found = similarity.topk(10)
    votes = torch.zeros(24, 4).scatter_add_(
        1, torch.tensor(trainer.evaluator.train_images["label"])[found], (values / 0.07).exp()
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
    assert sorted(lines) == [0, 2, 4, 6] and "eval_knn10" not in lines[2]
    best = max((2, 4, 6), key=lambda step: lines[step]["eval_overlap10"])
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


@pytest.mark.parametrize(
    "often",
    [{"eval_strategy": "steps", "eval_steps": 4}, pytest.param({"eval_strategy": "epoch"}, marks=pytest.mark.slow)],
)
def test_training_is_compared_with_an_evaluation_before_its_first_step(tmp_path, image_parquet, networks, often):
    """However often one is asked for: alarms and verdict took the first that there was for the start, and missed a
    collapse within it. A resumed run keeps that of its start."""
    options = {"evaluator": make_evaluator, "save_strategy": "steps", "save_steps": 3, "max_steps": 8, **often}
    options["save_total_limit"] = None
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    before = trainer.evaluate()
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_overlap10" in line]
    assert [line["step"] for line in lines] == [0, 4, 8] if "eval_steps" in often else [0, 6, 8]
    assert lines[0]["eval_overlap10"] == before["eval_overlap10"] and lines[0]["eval_cosine"] == before["eval_cosine"]
    again = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    resumed = [line for line in again.state.log_history if "eval_overlap10" in line]
    assert [line["step"] for line in resumed] == [line["step"] for line in lines]
    assert resumed[0] == lines[0]


def test_the_loss_of_held_out_images_is_that_of_mixed_batches(tmp_path, image_parquet, networks):
    """Folders are sorted by class: batches in their order were of one class, and the last one was left out."""

    class Recording(CoSSLoss):
        name = None
        batches = []

        def forward(self, student, teacher, index=None):
            if not self.training:
                self.batches.append(index.tolist())
            return super().forward(student, teacher, index)

    def sorted_by_class(splits, teacher):
        rows = splits.test.select(np.argsort(splits.test["label"][:], kind="stable"))
        return Evaluator(teacher, rows, splits.image_column)

    options = {"evaluator": sorted_by_class, "criterion": Recording(), "per_device_train_batch_size": 7}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet, **options)
    first = trainer.evaluate()["eval_loss"]
    labels = trainer.evaluator.test_images["label"][:]
    batches = Recording.batches.copy()
    assert [len(batch) for batch in batches] == [7, 7, 7], "an incomplete batch has another loss"
    assert all(len({labels[row] for row in batch}) > 2 for batch in batches)
    assert {labels[row] for batch in batches for row in batch} == set(labels)
    assert len({row for batch in batches for row in batch}) == 21
    assert trainer.evaluate()["eval_loss"] == first and Recording.batches == 2 * batches


@pytest.mark.parametrize(("student", "is_measured"), [("small", False), ("resnet", True)])
@pytest.mark.parametrize("metric", ["cosine", "dimension_cosine"])
def test_a_cosine_is_no_metric_of_other_dimensions(tmp_path, image_parquet, networks, student, is_measured, metric):
    """Without a head; the first evaluation ended in a KeyError."""

    def diagnosing(splits, teacher):
        return Evaluator(teacher, splits.test, splits.image_column, diagnostics=True)

    options = {"evaluator": diagnosing, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    arguments = tmp_path, image_parquet, networks.teacher, getattr(networks, student)
    if is_measured:
        trainer = h.make_trainer(*arguments, method="rkd", metric_for_best_model=metric, **options)
        trainer.train()
        assert any(f"eval_{metric}" in line for line in trainer.state.log_history)
        return
    with pytest.raises(ValueError, match=f"metric_for_best_model={metric} is not measured .* one of overlap10, cka,"):
        h.make_trainer(*arguments, method="rkd", metric_for_best_model=metric, **options)
    trainer = h.make_trainer(*arguments, method="coss", metric_for_best_model=metric, **options)  # with a head
    assert f"eval_{metric}" in trainer.evaluate()


def test_evaluation_needs_held_out_images(tmp_path, image_parquet, networks):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.resnet)
    with pytest.raises(ValueError, match="--validation_size"):
        trainer.evaluation_loop(None, "")


def test_losses_logged_by_epoch_behind_an_evaluation_of_the_last_step(tmp_path, image_parquet, networks):
    """The evaluation stops the clock, and no step follows that would start it."""
    options = {"evaluator": make_evaluator, "logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, **options)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "loss" in line]
    assert line["images_seen"] == 48 and "images_per_second" not in line
