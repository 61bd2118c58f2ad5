"""What cannot be read is not what is not there.

A student's broken ``preprocessor_config.json`` was once silently replaced by the teacher's, and published.
"""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import transformers.utils.hub
from transformers import AutoModel

import coss_hf.models.files
import tests.helpers.runs as h
from coss_hf.cli.parser import parse
from coss_hf.models.cifar.classifier import load_classifier
from coss_hf.models.classifier_head import find_classifier
from coss_hf.models.files import find_file
from coss_hf.models.heads import load_head
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.arguments import DataArguments, ModelArguments


def cut(path):
    path.write_text(path.read_text()[:20])


def of_no_class(path):
    path.write_text('{"image_processor_type": "NoSuchImageProcessor"}')


def of_wrong_values(path):
    path.write_text('{"image_processor_type": "ViTImageProcessor", "size": "large"}')


def not_text(path):
    path.write_bytes(b"\xff\xfe\x00")


BROKEN = [cut, of_no_class, of_wrong_values, not_text]


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_broken_image_processor_is_refused(networks, tmp_path, damage, role):
    folder = tmp_path / "broken"
    shutil.copytree(networks.small, folder)
    damage(folder / "preprocessor_config.json")
    models = ModelArguments(**{"teacher": networks.teacher, "student": networks.resnet, role: str(folder)})
    with pytest.raises(ValueError, match=rf"^--{role}.*broken: its image processor.*preprocessor_config.json"):
        models.load_student(models.load_teacher())


@pytest.mark.parametrize("init", ["pretrained", "random"])
def test_only_an_absent_image_processor_is_replaced(networks, tmp_path, init):
    shutil.copytree(networks.small, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    teacher = load_backbone(networks.teacher)
    student = load_backbone(str(tmp_path / "bare"), argument="student", teacher=teacher, init=init)
    assert student.processor is teacher.processor
    (tmp_path / "bare" / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="preprocessor_config.json"):
        load_backbone(str(tmp_path / "bare"), argument="student", teacher=teacher, init=init)


def test_unreachable_hub_is_not_reported_as_missing_file(monkeypatch, networks):
    """With no answer, files were taken for absent: a head was left out of an evaluation, and none the wiser."""

    def no_answer(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(transformers.utils.hub, "hf_hub_download", no_answer)
    monkeypatch.setattr(coss_hf.models.files.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises((ValueError, ConnectionError), match="no route"):
        find_file("somebody/student", "head.safetensors")
    assert find_file(networks.small, "head.safetensors") is None


def test_a_broken_head_is_refused(tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"head\.safetensors cannot be read .*as the run left it"):
        load_head(str(tmp_path))


def test_a_broken_record_is_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"arguments": ')
    with pytest.raises(ValueError, match=r"run\.json cannot be read .*correct or remove it"):
        DataArguments(dataset="images").follow(str(tmp_path))


def test_what_is_followed_is_not_changed(tmp_path):
    (tmp_path / "run.json").write_text('{"arguments": {"dataset": "images", "validation_size": 7}}')
    given = DataArguments(dataset="images")
    followed = given.follow(str(tmp_path))
    assert followed.validation_size == 7 and followed.holds_out_by_default
    assert given.validation_size is None and not given.holds_out_by_default


@pytest.mark.parametrize(
    ("evaluated_on", "words"), [(None, "on all images of images,"), ("validation", "with 7, perhaps")]
)
def test_images_that_a_student_was_trained_on_are_no_test(tmp_path, image_parquet, caplog, evaluated_on, words):
    """After a run that held nothing out the remedy led to training images, with a hint that some may be among them."""
    run = {"arguments": {"dataset": "images", "validation_size": 7}, "evaluated_on": evaluated_on}
    (tmp_path / "run.json").write_text(json.dumps(run))
    followed = DataArguments(dataset="images", validation_size=8).follow(str(tmp_path))
    split = datasets.load_dataset("parquet", data_files=str(Path(image_parquet, "train.parquet")), split="train")
    with caplog.at_level("WARNING", logger="coss_hf"):
        followed.load(datasets.DatasetDict(train=split, test=split))
        assert caplog.messages == [], "the test split is measured"
        followed.load(split)
    assert words in caplog.text


def test_unreadable_classifier_is_not_reported_as_absent(tmp_path):
    teacher = load_backbone(h.save_vit(tmp_path / "vit")).freeze()
    assert find_classifier(teacher) is not None
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"^--teacher=.*vit: whether its checkpoint has a classifier cannot be read"):
        find_classifier(teacher)
    shutil.rmtree(tmp_path / "vit")  # gone: there is none
    assert find_classifier(teacher) is None


def test_a_classifier_of_no_checkpoint_is_absent(networks):
    model = AutoModel.from_config(load_backbone(networks.small).model.config)
    backbone = load_backbone(networks.small)
    backbone.model, backbone.name = model, type(model).__name__
    assert find_classifier(backbone) is None


@pytest.mark.parametrize(
    ("file", "message"), [("model.safetensors", "classify"), ("preprocessor_config.json", "image pr")]
)
def test_a_broken_network_to_train_as_a_classifier(tmp_path, file, message):
    folder = h.save_vit(tmp_path / "vit")
    (tmp_path / "vit" / file).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"^--model .*vit.*{message}"):
        load_classifier(folder, ["a", "b"])


def test_binary_yaml_file_is_rejected(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="^--config .*run.yaml cannot be read"):
        parse((DataArguments,), ["--config", str(tmp_path / "run.yaml")])


def test_evaluation_follows_the_images_of_the_run(tmp_path, monkeypatch):
    """Another test split, column or number of training images gave a table that contradicted the run's record."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    run = {"dataset": str(tmp_path / "images"), "test_split": "held", "label_column": "kind", "max_train_samples": 9}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": run | {"validation_size": 7}}))
    given = DataArguments(dataset="images", label_column="label")  # the same place, by another path
    followed = given.follow(str(tmp_path))
    assert followed.test_split == "held" and followed.max_train_samples == 9 and followed.validation_size == 7
    assert followed.label_column == "label", "what is given stands"
    other = DataArguments(dataset="elsewhere").follow(str(tmp_path))
    assert other.test_split is None and other.max_train_samples is None


def test_a_teacher_by_another_path_is_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    run = {"teacher": str(tmp_path / "teacher"), "teacher_size": 24}
    (tmp_path / "run.json").write_text(json.dumps({"arguments": run}))
    assert ModelArguments(teacher="./teacher", student=str(tmp_path)).follow()[0].teacher_size == 24
    assert ModelArguments(teacher="other", student=str(tmp_path)).follow()[0].teacher_size is None
