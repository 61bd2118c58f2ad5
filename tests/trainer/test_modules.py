"""Any module as teacher and as student: trained, resumed, saved, loaded, measured, described."""

import json
import re
import shutil
import textwrap
from pathlib import Path

import datasets
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import coss_hf
from coss_hf import Backbone, DistillationArguments, DistillationTrainer, Student
from coss_hf.hub.student import Student as StudentClass
from coss_hf.neighbors.mining import nearest_neighbors
from coss_hf.trainer.checkpoint_files import RECORD, TEACHER_CODE
from coss_hf.trainer.manifest import write_manifest
from tests.helpers.modules import INPUT, encoder, torchvision_resnet

NEW = {
    "torchvision": lambda seed: torchvision_resnet(seed),
    "timm": lambda seed: timm.create_model("test_vit", img_size=32, num_classes=7),
    "own": lambda seed: encoder("map", dim=16, seed=seed),
}


@pytest.fixture
def images(image_parquet):
    return datasets.load_dataset("parquet", data_files=str(Path(image_parquet, "train.parquet")), split="train")


def arguments(folder, **options) -> DistillationArguments:
    options = {
        "settings": "paper",
        "per_device_train_batch_size": 8,
        "max_steps": 4,
        "augmentation": "cifar",
        "learning_rate": 0.01,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    } | options
    return DistillationArguments(str(folder), **options)


def backbone(kind: str, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    options = INPUT if kind == "own" else {"size": 32, "mean": 0.5, "std": 0.5}
    return Backbone.from_module(NEW[kind](seed), **options)


def embeddings(trainer: DistillationTrainer, images) -> torch.Tensor:
    network = trainer.student
    with torch.no_grad():
        return trainer.project(coss_hf.embed(network, images["image"]))


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        ("timm", "torchvision"),
        ("torchvision", "own"),
        pytest.param("own", "timm", marks=pytest.mark.slow),
        pytest.param("own", "own", marks=pytest.mark.slow),
    ],
)
def test_trained_saved_and_loaded(tmp_path, images, teacher, student):
    given = {"train_dataset": images, "eval_dataset": images.select(range(16))}
    trainer = DistillationTrainer(backbone(teacher, 1), backbone(student, 2), arguments(tmp_path / "out"), **given)
    before = {name: value.clone() for name, value in trainer.student.model.state_dict().items()}
    trainer.train()
    trainer.save_model()
    if (teacher, student) == ("own", "own"):
        assert set(trainer.report().record["results"]) == {"teacher", "student", "random"}
    assert set(trainer.compare()) == {"teacher", "student", "random"}
    changed = [
        name for name, value in trainer.student.model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert changed
    trainer.student.model.eval()
    expected = embeddings(trainer, images)
    module = None if student == "timm" else (lambda: NEW[student](9))
    again = Student.from_pretrained(tmp_path / "out", module=module)
    torch.testing.assert_close(again.encode(images["image"]), expected, rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "copy")
    copied = Student.from_pretrained(tmp_path / "copy", module=module)
    torch.testing.assert_close(copied.encode(images["image"]), expected, rtol=1e-5, atol=1e-5)
    if module is not None:
        keys = {name for name in NEW[student](0).state_dict() if not name.startswith("fc.")}
        assert set(load_file(tmp_path / "out" / "model.safetensors")) == keys


@pytest.mark.parametrize(("method", "call"), [("coss", "Student.from_pretrained"), ("rkd", "load_backbone")])
def test_the_lines_that_use_the_student_run(tmp_path, images, method, call):
    """Where no teacher's space is reached, they called `Student.from_pretrained`, which refuses such a student."""
    args = arguments(tmp_path / "out", max_steps=1, method=method)
    trainer = DistillationTrainer(backbone("own", 1), backbone("own", 2), args, images)
    trainer.train()
    trainer.save_model()
    text = trainer.closing_summary({"results": {}, "verdict": []}, in_python=True)
    lines = textwrap.dedent(text.split("Use the student:\n")[1].split("\n\n")[0])
    assert call in lines
    names = {"images": images["image"][:2], "build": NEW["own"]}
    exec(lines.replace("module=...", "module=build(9)"), names)
    expected = (
        embeddings(trainer, images)[:2] if method == "coss" else coss_hf.embed(trainer.student, images["image"][:2])
    )
    torch.testing.assert_close(names["embeddings"], expected, rtol=1e-5, atol=1e-5)


def test_names_of_libraries_as_they_are(tmp_path, images):
    """Nothing but the objects: size, mean and std are those of timm and of torchvision."""
    student = torchvision.models.shufflenet_v2_x0_5()
    teacher = timm.create_model("test_resnet")
    trainer = DistillationTrainer(teacher, student, arguments(tmp_path / "out", max_steps=1), images.select(range(8)))
    assert trainer.teacher.size == (160, 160) and trainer.student.size == (224, 224)
    assert student.fc.out_features == 1000, "the caller's module keeps its classifier"
    trainer.train()
    trainer.save_model()
    assert Student.from_pretrained(tmp_path / "out", module=torchvision.models.shufflenet_v2_x0_5).dim == 96
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["architecture"] == "torchvision.models.shufflenetv2.ShuffleNetV2"


def test_a_student_of_unknown_input_takes_the_teachers(tmp_path, images, caplog):
    trainer = DistillationTrainer(backbone("own", 1), encoder(), arguments(tmp_path / "out"), images)
    assert trainer.student.processor.to_dict() == trainer.teacher.processor.to_dict()
    assert "student=Encoder" in caplog.text and "as the teacher's; Backbone.from_module(" in caplog.text


def test_resumed_as_uninterrupted(tmp_path, images):
    options = {"save_strategy": "steps", "save_steps": 2}

    def train(folder, **resume) -> Path:
        args = arguments(folder, **options)
        trainer = DistillationTrainer(backbone("torchvision", 1), backbone("own", 2), args, images)
        trainer.train(**resume)
        trainer.save_model()
        return Path(folder, "model.safetensors")

    whole = train(tmp_path / "whole").read_bytes()
    train(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    assert train(tmp_path / "out", resume_from_checkpoint=True).read_bytes() == whole


class Signed(nn.Module):
    """Embeds by an attribute that is no weight."""

    def __init__(self, sign: float):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3 * 16 * 16, 16)
        self.sign = sign

    def forward(self, images):
        return torch.relu(self.sign * self.layer(images.flatten(1)))


def by_function(embedding) -> Backbone:
    return Backbone.from_module(Signed(1.0), embedding=embedding, **INPUT)


TEACHERS = {
    "attribute": (
        lambda: Backbone.from_module(Signed(1.0), **INPUT),
        lambda: Backbone.from_module(Signed(-1.0), **INPUT),
    ),
    "function": (lambda: by_function(lambda o: o), lambda: by_function(lambda o: o.flip(1))),
}


class Counting(Signed):
    """Leaves in itself how often it was called, and with what."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        self.last = super().forward(images)
        return self.last


def test_what_a_teacher_keeps_of_its_calls_is_no_code(tmp_path, images):
    """The same teacher was refused in the next cell of a notebook."""
    teacher = Backbone.from_module(Counting(1.0), **INPUT)
    options = {"save_strategy": "steps", "save_steps": 2}
    for resumed in (False, True):
        trainer = DistillationTrainer(teacher, backbone("own", 2), arguments(tmp_path, **options), images)
        trainer.train(resume_from_checkpoint=resumed)
    assert teacher.code() == Backbone.from_module(Counting(1.0), **INPUT).code() != ""


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_of_equal_weights_and_other_code_is_another(tmp_path, images, kind):
    first, second = TEACHERS[kind]
    options = {"save_strategy": "steps", "save_steps": 2, "channels_last": True}

    def make(teacher: Backbone) -> DistillationTrainer:
        return DistillationTrainer(teacher, backbone("own", 2), arguments(tmp_path, **options), images)

    make(first()).train()
    with pytest.raises(ValueError, match="written with another teacher's code"):
        make(second()).train(resume_from_checkpoint=True)
    used = first()
    make(used)  # gives it hooks of its own
    make(used).train(resume_from_checkpoint=True)
    record = tmp_path / "checkpoint-4" / RECORD
    written = json.loads(record.read_text())
    code = written[TEACHER_CODE]
    record.write_text(json.dumps({**written, TEACHER_CODE: code.replace("Python 3.", "Python 2.")}))
    write_manifest(record.parent)
    make(second()).train(resume_from_checkpoint=True)  # nobody can compare these


@pytest.mark.parametrize("kind", TEACHERS)
def test_neighbours_of_a_teacher_of_other_code_are_searched_anew(tmp_path, images, kind):
    first, second = (make() for make in TEACHERS[kind])
    rows = coss_hf.load_images(images).train
    assert first.fingerprint() == second.fingerprint()
    nearest_neighbors(rows, first, "image", k=3, cache_dir=tmp_path / "cache")
    cached, _ = nearest_neighbors(rows, second, "image", k=3, cache_dir=tmp_path / "cache")
    fresh, _ = nearest_neighbors(rows, second, "image", k=3, cache_dir=tmp_path / "other")
    assert (cached == fresh).all()
    entries = len(list(Path(tmp_path, "cache").iterdir()))
    nearest_neighbors(rows, TEACHERS[kind][0]().freeze(), "image", k=3, cache_dir=tmp_path / "cache")
    assert len(list(Path(tmp_path, "cache").iterdir())) == entries, "of the first, frozen or not"


@pytest.mark.parametrize("module", ["vector", "strange"])
def test_the_card_says_how_to_load_it(tmp_path, images, module):
    options = {"embedding": read_features} if module == "strange" else {}
    student = Backbone.from_module(encoder(module), **INPUT, **options)
    trainer = DistillationTrainer(backbone("own", 1), student, arguments(tmp_path / "out", max_steps=1), images)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: coss-hf" in card and "AutoModel" not in card and "huggingface.co/Encoder" not in card
    codes = re.findall(r"```python\n(.*?)```", card, re.S)
    found = []
    for code in codes:
        names = {"encoder": encoder, "form": module, "read": read_features}
        code = re.sub(r"(?m)^read = \.\.\..*$", "", code)  # the reader's part
        exec(code.replace("module = ...", "module = encoder(form)"), names)
        found.append(names["embedding"])
    assert found[0].shape == (1, 16) and len(codes) == 2
    torch.testing.assert_close(*found)


def read_features(output: dict) -> torch.Tensor:
    return output["features"]


@pytest.mark.parametrize(
    ("method", "teacher"), [("at", "torchvision"), ("kd", "torchvision"), ("coss + nst", "timm"), ("kd", "timm")]
)
def test_methods_of_maps_and_logits(tmp_path, images, method, teacher):
    args = arguments(tmp_path / "out", method=method, max_steps=1)
    trainer = DistillationTrainer(backbone(teacher, 1), backbone("own", 2), args, images)
    trainer.train()
    trainer.save_model()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8))


@pytest.mark.parametrize(
    ("method", "student", "message"),
    [
        ("at", flat, 'method="at" compares feature maps, and Sequential .* gives none that lie on a grid'),
        ("kd", lambda: encoder(), 'method="kd": teacher Encoder .* has no linear classifier'),
    ],
)
def test_methods_that_a_module_does_not_serve_are_refused(tmp_path, images, method, student, message):
    args = arguments(tmp_path / "out", method=method)
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(Backbone.from_module(encoder(), **INPUT), student(), args, images)


class NoGradient(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = encoder()

    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"teacher": encoder()},
            r"^teacher=Encoder .*size and mean and std .*from_module\(module, size=, mean=, std=\)",
        ),
        ({"teacher": encoder("scores")}, r"^teacher=Encoder .* returns a tuple"),
        ({"student": encoder("strange")}, r"^student=Encoder .* returns a dict of 'scores', 'features'"),
        ({"student": NoGradient()}, r"^student=NoGradient .*: its embedding depends on none of its parameters"),
        ({"student": nn.Identity()}, r"^student=Identity .* has no parameters"),
    ],
)
def test_bad_modules_are_refused_before_training(tmp_path, images, options, message):
    given = {"teacher": backbone("own", 1), "student": backbone("own", 2), "train_dataset": images} | options
    with pytest.raises(ValueError, match=message) as raised:
        DistillationTrainer(args=arguments(tmp_path / "out"), **given)
    assert "--" not in str(raised.value)


def test_a_student_that_is_its_teacher_is_refused(tmp_path, images):
    """Its weights were frozen with the teacher's."""
    module = backbone("own", 1)
    for student in (module, module.model.module):
        with pytest.raises(ValueError, match="^student shares weights with teacher, which stays .*copy.deepcopy"):
            DistillationTrainer(module, student, arguments(tmp_path / "out"), images)


@pytest.mark.slow
def test_onnx_of_a_module(tmp_path, images):
    pytest.importorskip("onnxruntime")
    from coss_hf.hub.export import embed_by_all, open_file, write_graph

    student = StudentClass(backbone("own"))
    pixels = student.backbone.preprocess(images["image"][:4])
    write_graph(student, tmp_path / "model.onnx")
    rows = embed_by_all({"module": student, "onnx": open_file(tmp_path / "model.onnx", 1)}, [pixels])
    torch.testing.assert_close(rows["onnx"], rows["module"], rtol=1e-4, atol=1e-5)
