"""What an evaluation measures where images were deleted since it was set up."""

import datasets
import pytest
import torch

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.evaluation.embeddings import evaluate_embeddings
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.models.loading import load_backbone


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_lost_is_not_measured_under_its_label(tmp_path, networks, caplog, workers):
    """Another image stood in its place, and was scored under the lost image's label."""
    images, labels = h.colour_images(32, seed=0)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "photos" / ("train" if i < 20 else "test") / str(label) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    splits = load_images(str(tmp_path / "photos"), validation_size=0, on_bad_image="skip")
    teacher, student = load_backbone(networks.teacher).freeze(), load_backbone(networks.resnet).freeze()
    evaluator = Evaluator(
        teacher,
        splits.test,
        splits.image_column,
        label_column=splits.label_column,
        train_images=splits.train,
        retrieval=True,
        on_bad_image="skip",
        num_workers=workers,
    )
    test, train = evaluator.teacher_test_features, evaluator.teacher_train_features  # before anything is lost
    names = [path for split in ("test", "train") for path in sorted((tmp_path / "photos" / split).rglob("*.png"))]
    names[3].unlink()
    names[12 + 5].write_bytes(b"not an image")
    found, _ = evaluator(student)
    kept_test, kept_train = torch.arange(12) != 3, torch.arange(20) != 5
    of_student = evaluator.embed(student, splits.test, ""), evaluator.embed(student, splits.train, "")
    expected = evaluate_embeddings(
        of_student[0][kept_test],
        test[kept_test],
        train_features=of_student[1][kept_train],
        train_labels=evaluator.train_labels[kept_train],
        test_labels=evaluator.test_labels[kept_test],
        teacher_gallery=train[kept_train],
    )
    assert found == expected
    assert "1 of 12 images can no longer be decoded and are left out" in caplog.text and names[3].name in caplog.text


@pytest.mark.parametrize(("test", "train"), [(1, 3), (3, 1)])
def test_metrics_of_very_few_images(networks, test, train):
    """What is announced is what is measured, and a single image ends no run."""
    images, labels = h.colour_images(16, seed=0)
    rows = datasets.Dataset.from_dict({"image": images, "label": [str(label) for label in labels]})
    rows = rows.cast_column("image", datasets.Image(decode=False))
    classes = rows["label"][:]
    same = [i for i, label in enumerate(classes) if label == classes[0]]
    assert len(same) >= 4
    network = load_backbone(networks.resnet).freeze()
    evaluator = Evaluator(
        load_backbone(networks.teacher).freeze(),
        rows.select(same[:test]),
        "image",
        label_column="label",
        train_images=rows.select(same[test : test + train]),
        diagnostics=True,
    )
    found = {name for name, value in evaluator(network)[0].items() if value is not None}
    assert ("cka" in found) == (test > 1) and ("probe" in found) == (train > 1)
    of_teacher = {"teacher_effective_rank", "teacher_duplicates"}
    of_dimensions = {"cosine", "dimension_cosine"}  # the two networks' may differ
    assert found - of_teacher - of_dimensions == set(evaluator.metric_names()) - of_dimensions
