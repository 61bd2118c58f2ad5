"""A student that replaces its teacher: one call loads backbone and head."""

import json
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

import coss_hf
import tests.helpers.runs as h
from coss_hf.hub.student import Student
from coss_hf.models.backbone import Backbone
from coss_hf.models.heads import load_head
from coss_hf.models.loading import load_backbone
from tests.helpers.networks import SMALL, half

IMAGES = h.colour_images(5, 7)[0]


def distil(tmp_path, image_parquet, networks, student, **args):
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, student, max_steps=2, **args)
    trainer.train()
    trainer.save_model()
    return trainer, Path(trainer.args.output_dir)


@pytest.mark.parametrize(("kind", "head"), [("small", "auto"), ("vit", "linear"), ("resnet", "auto")])
def test_student_loads_backbone_and_head(tmp_path, image_parquet, networks, kind, head):
    trainer, folder = distil(tmp_path, image_parquet, networks, getattr(networks, kind), head=head)
    student = coss_hf.Student.from_pretrained(folder)
    assert (student.head is None) == (kind == "resnet")
    pixels = student.backbone.preprocess(IMAGES)
    trainer.student.model.eval()
    expected = trainer.project(trainer.student.features(pixels).embedding)
    assert expected.shape == (5, 16) and student.dim == 16
    torch.testing.assert_close(student.embed(IMAGES, batch_size=2), expected)
    torch.testing.assert_close(student(pixels), expected)
    space = student.backbone.model.config.teacher_space
    assert space == {
        "teacher": networks.teacher,
        "revision": None,
        "pooling": "pooler",
        "dim": 16,
        "head": kind != "resnet",
    }


def test_encode_takes_images_paths_and_columns(tmp_path, image_parquet, networks):
    _, folder = distil(tmp_path, image_parquet, networks, networks.small)
    student = Student.from_pretrained(folder)
    expected = student.embed(IMAGES)
    paths = [tmp_path / f"{i}.png" for i in range(len(IMAGES))]
    for image, path in zip(IMAGES, paths):
        image.save(path)
    column = datasets.Dataset.from_dict({"image": [str(path) for path in paths]}).cast_column("image", datasets.Image())
    arrays = np.stack([np.asarray(image) for image in IMAGES])
    for images in (IMAGES, paths, [str(path) for path in paths], column["image"], arrays):
        torch.testing.assert_close(student.encode(images, batch_size=2), expected)
    torch.testing.assert_close(student.encode(paths[0], device="cpu"), expected[:1])
    torch.testing.assert_close(student.encode(image for image in IMAGES), expected)
    pixels = student.backbone.processor(IMAGES, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(student.encode(pixels, batch_size=2), expected)
    unit = student.encode(IMAGES, normalize=True)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(IMAGES)))
    torch.testing.assert_close(student.similarity(expected, 7 * unit[:2]), unit @ unit[:2].T)


def test_encode_names_what_it_cannot_read(tmp_path, image_parquet, networks):
    _, folder = distil(tmp_path, image_parquet, networks, networks.small)
    student = Student.from_pretrained(folder)
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"images\[1\]: image .*broken.jpg cannot be decoded"):
        student.encode([IMAGES[0], tmp_path / "broken.jpg"])
    with pytest.raises(ValueError, match=r"images: a dict of image, label; give the images in it"):
        student.encode({"image": IMAGES[0], "label": 3})
    with pytest.raises(ValueError, match="images: got none"):
        student.encode([])
    with pytest.raises(ValueError, match="batch_size=0"):
        student.encode(IMAGES, batch_size=0)
    with pytest.raises(ValueError, match="of one dimension"):
        student.similarity(torch.zeros(2, 3), torch.zeros(2, 4))


def test_save_pretrained_writes_the_complete_student(tmp_path, image_parquet, networks):
    _, folder = distil(tmp_path, image_parquet, networks, networks.small)
    (folder / "README.md").write_text("# Card")
    student = Student.from_pretrained(folder)
    student.save_pretrained(tmp_path / "copy")
    copy = Student.from_pretrained(tmp_path / "copy")
    assert torch.equal(copy.embed(IMAGES), student.embed(IMAGES))
    assert (tmp_path / "copy" / "README.md").read_text() == "# Card"
    assert {path.name for path in (tmp_path / "copy").iterdir()} <= {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="folder=.*README.md is a file"):
        student.save_pretrained(folder / "README.md")


def test_a_folder_of_another_run_does_not_keep_its_results(tmp_path, networks):
    """Its card and record would be published with the new weights; a folder without a run keeps its card."""
    backbone = load_backbone(networks.small)
    backbone.model.config.teacher_space = {"teacher": "t", "revision": None, "dim": backbone.dim, "head": False}
    Student(backbone).save_pretrained(tmp_path / "plain")
    student = Student.from_pretrained(tmp_path / "plain")
    for name, record in (("run", "{}"), ("repository", None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "README.md").write_text("# Card")
        if record is not None:
            (folder / "run.json").write_text(record)
        student.save_pretrained(folder)
        assert (folder / "README.md").is_file() == (record is None) and not (folder / "run.json").exists()
    (folder / "run.json").write_text("{}")
    student.save_pretrained(folder / "best")
    Student.from_pretrained(folder / "best").save_pretrained(folder)
    assert (folder / "README.md").is_file() and (folder / "run.json").is_file(), "those of the same run"


def test_a_student_is_trained_further_under_another_teacher(tmp_path, image_parquet, networks):
    _, folder = distil(tmp_path, image_parquet, networks, networks.small)
    networks.teacher = h.save_resnet(tmp_path / "other", seed=5, hidden_sizes=(4, 8, 12))
    (tmp_path / "again").mkdir()
    _, again = distil(tmp_path / "again", image_parquet, networks, str(folder))
    assert Student.from_pretrained(again).dim == 12
    _, again = distil(tmp_path / "again", image_parquet, networks, str(folder), method="sp", overwrite_output_dir=True)
    with pytest.raises(ValueError, match="was not trained into a teacher's space"):
        Student.from_pretrained(again)


def test_teacher_fingerprint_does_not_depend_on_student_files(tmp_path, networks):
    before = load_backbone(networks.resnet).fingerprint()
    path = Path(networks.resnet, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher_space": {"dim": 3}}))
    assert load_backbone(networks.resnet).fingerprint() == before


def test_invalid_student_input_is_rejected(tmp_path, image_parquet, networks):
    with pytest.raises(ValueError, match="was not trained into a teacher's space"):
        Student.from_pretrained(networks.small)
    _, folder = distil(tmp_path, image_parquet, networks, networks.small)
    head = folder / "head.safetensors"
    tensors = load_file(head)
    head.unlink()
    with pytest.raises(ValueError, match="head.safetensors is missing"):
        Student.from_pretrained(folder)
    save_file(
        {name: torch.cat([tensor] * 2, -1) if name == "0.weight" else tensor for name, tensor in tensors.items()}, head
    )
    with pytest.raises(ValueError, match="do not fit the head"):
        Student.from_pretrained(folder)
    _, folder = distil(tmp_path, image_parquet, networks, networks.resnet, overwrite_output_dir=True)
    save_file(tensors, folder / "head.safetensors")
    with pytest.raises(ValueError, match="of another run"):
        Student.from_pretrained(folder)


def test_unknown_name_has_no_head(tmp_path):
    assert load_head(tmp_path) is None and load_head("nobody/nothing") is None


def test_encode_names_the_position_of_an_image_that_cannot_be_decoded():
    student = Student(Backbone(ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), half()))
    records = []
    for image in IMAGES:
        buffer = BytesIO()
        image.save(buffer, "PNG")
        records.append({"bytes": buffer.getvalue(), "path": None})
    records[3]["bytes"] = records[3]["bytes"][: len(records[3]["bytes"]) // 2]
    column = datasets.Dataset.from_dict({"image": records}).cast_column("image", datasets.Image())["image"]
    opened = [Image.open(BytesIO(record["bytes"])) for record in records]
    for given in (column, opened):
        with pytest.raises(ValueError, match=r"^images\[3\]: cannot be decoded"):
            student.encode(given, batch_size=2)


def test_encode_turns_images_once(tmp_path):
    student = Student(Backbone(ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), half()))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    IMAGES[0].transpose(Image.Transpose.ROTATE_180).save(tmp_path / "turned.png", exif=exif)
    expected = student.encode(IMAGES[0])
    for given in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        torch.testing.assert_close(student.encode(given), expected)


def test_a_student_without_processor_is_not_saved_in_part(tmp_path):
    student = Student(Backbone(ViTModel(ViTConfig(**SMALL), add_pooling_layer=False), None, size=32))
    with pytest.raises(ValueError, match="^processor=None: ViTModel "):
        student.save_pretrained(tmp_path / "student")
    assert not (tmp_path / "student").exists()
