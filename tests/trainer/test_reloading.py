"""A run is done when its folder loads.

A random student of Transformers with a teacher of timm once ended with exit code 0 and no preprocessor_config.json, so
that ``AutoImageProcessor``, ``coss_hf.embed``, ``Student.from_pretrained`` and the card's own snippet all failed.
"""

import errno
import json
import re
import shutil
from importlib.util import find_spec

import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Data2VecVisionConfig,
    Data2VecVisionForImageClassification,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import coss_hf
import tests.helpers.networks as n
import tests.helpers.runs as h
from coss_hf.models.backbone import Backbone
from coss_hf.models.cifar import CifarResNetConfig, CifarResNetModel
from coss_hf.models.image_processor import noise_image, transformers_processor
from coss_hf.models.loading import load_backbone
from coss_hf.trainer import rehearsal
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.checkpointing import load_student
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.rehearsal import rehearse
from coss_hf.trainer.reloading import MOST_COPIED, NotReloadable, check_before_training, check_saving
from coss_hf.trainer.training_args import DistillationArguments
from tests.helpers.modules import INPUT, encoder

TIMM = {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.4] * 3, "std": [0.2] * 3}
VIT = [
    "hidden_size=16",
    "num_hidden_layers=1",
    "num_attention_heads=2",
    "intermediate_size=16",
    "image_size=32",
    "patch_size=8",
]


def timm_teacher(folder):
    config = n.timm_config("test_resnet")
    config.pretrained_cfg = {**TIMM, "num_classes": 5}
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    return str(folder)


def build(tmp_path, images, teacher: str, student: str, **models):
    models = ModelArguments(teacher=teacher, student=student, **models)
    args = DistillationArguments(
        str(tmp_path / "out"),
        settings="paper",
        per_device_train_batch_size=8,
        max_steps=1,
        augmentation="cifar",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    return build_run(models, DataArguments(dataset=str(images), validation_size=0), args)


def test_a_student_of_transformers_with_a_teacher_of_timm(tmp_path, image_parquet):
    teacher = timm_teacher(tmp_path / "timm")
    run = build(tmp_path, image_parquet, teacher, "vit", student_init="random", student_config_overrides=VIT)
    run.train()
    run.trainer.create_model_card()
    folder = tmp_path / "out"
    images = [noise_image(60, 40), noise_image(50, 50)]
    processor = AutoImageProcessor.from_pretrained(folder)
    timms = run.trainer.teacher.processor(images)["pixel_values"]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    assert (pixels - timms).abs().max() < 2.5 / 255 / 0.2
    with torch.no_grad():
        expected = run.trainer.student.features(pixels).embedding
        stock = AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(stock, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coss_hf.embed(str(folder), images), expected, rtol=1e-4, atol=1e-5)
    assert coss_hf.Student.from_pretrained(folder).embed(images).shape == (2, run.trainer.teacher.dim)
    codes = dict(re.findall(r"### (.+?)\n.*?```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL))
    assert {*codes} == {"Transformers", "Pipeline", "sentence-transformers", "coss_hf"}
    if not find_spec("sentence_transformers"):
        del codes["sentence-transformers"]
    for title, code in codes.items():
        found = {}
        exec(code, found)
        in_teacher_space = title in ("sentence-transformers", "coss_hf")
        assert found["embedding"].shape == (1, run.trainer.teacher.dim if in_teacher_space else 16)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"crop_pct": 0.95, "input_size": (3, 224, 224)},  # an odd number of pixels to cut off
        {"crop_pct": 0.9, "interpolation": "bilinear"},
        {"crop_pct": 1.0, "crop_mode": "squash"},
    ],
)
def test_timms_pixels_from_a_class_that_can_be_saved(tmp_path, config):
    processor = TimmWrapperImageProcessor({**TIMM, **config}, architecture="test_resnet")
    transformers_processor(processor).save_pretrained(tmp_path)
    written = AutoImageProcessor.from_pretrained(tmp_path)
    side = 2 * TIMM["input_size"][1]
    for image in (noise_image(side, side).resize((300, 300)), Image.new("RGB", (80, 60), (200, 100, 50))):
        theirs = processor([image])["pixel_values"]
        ours = written([image], return_tensors="pt")["pixel_values"]
        # A crop that cannot be central lies half a pixel to the other side.
        shifts = [(theirs - ours), (theirs[..., :-1, :-1] - ours[..., 1:, 1:])]
        assert min(shift.abs().max() for shift in shifts) < 2.5 / 255 / 0.2


def test_timms_pixels_that_no_class_of_transformers_has(tmp_path, networks):
    processor = TimmWrapperImageProcessor({**TIMM, "crop_mode": "border", "crop_pct": 0.9}, architecture="test_resnet")
    with pytest.raises(ValueError, match="^--student: no image processor of Transformers .*crop_mode=border.*give"):
        transformers_processor(processor, "student")


class Lost(type(h.processor())):
    """An image processor whose class writes nothing, as timm's does."""

    def save_pretrained(self, *args, **options):
        pass


class Changed(type(h.processor())):
    """An image processor whose class forgets what it was set to."""

    def to_dict(self):
        return super().to_dict() | {"image_mean": [0.1] * 3, "image_processor_type": "ViTImageProcessor"}


@pytest.mark.parametrize(("kind", "message"), [(Lost, "cannot be loaded once it is saved"), (Changed, "other pixels")])
def test_unsavable_processor_is_rejected_before_training(tmp_path, networks, kind, message):
    student = load_backbone(networks.small, argument="student")
    student.preprocessing.processor = student.processor = kind(
        **{key: getattr(student.processor, key) for key in ("size", "image_mean", "image_std")}
    )
    args = DistillationArguments(str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ValueError, match=rf"^student: its image processor \({kind.__name__}\) .*{message}"):
        rehearse(student, load_backbone(networks.teacher).freeze(), args)


class Adapter(nn.Module):
    """A linear layer with a low-rank term, as packages of adapters put it into a network."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.low = nn.Linear(base.in_features, 2, bias=False)
        self.high = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.high(self.low(x))


class UnregisteredConfig(ViTConfig):
    model_type = "unregistered"


class Unregistered(ViTModel):
    """A class that ``AutoModel`` does not know."""

    config_class = UnregisteredConfig


def without_layers(kind):
    network = kind(ViTConfig(**n.SMALL | {"num_hidden_layers": 4}))
    layers = network.base_model
    layers.layers = layers.layers[:2]
    return network


def with_adapters(kind):
    network = kind(ViTConfig(**n.SMALL))
    for layer in network.base_model.layers:
        layer.attention.q_proj = Adapter(layer.attention.q_proj)
    return network


NOT_OF_ITS_CONFIG = {
    "layers removed": (lambda: without_layers(ViTModel), "it lacks layers.2.*layers"),
    "layers removed from a classifier": (
        lambda: without_layers(ViTForImageClassification),
        "it lacks layers.2.*layers",
    ),
    "adapters": (lambda: with_adapters(ViTModel), "it lacks .*q_proj.* and alone has .*q_proj.base"),
    "adapters in a classifier": (lambda: with_adapters(ViTForImageClassification), "it lacks .*q_proj"),
    "unknown class": (lambda: Unregistered(UnregisteredConfig(**n.SMALL)), "unregistered"),
}


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("case", NOT_OF_ITS_CONFIG)
def test_a_student_of_another_structure_is_refused_before_training(tmp_path, networks, monkeypatch, case, is_large):
    """Layers that the configuration has and the student lacks were saved as zeros, others after all the training."""
    build, message = NOT_OF_ITS_CONFIG[case]
    if is_large:
        monkeypatch.setattr("coss_hf.trainer.reloading.MOST_COPIED", 0)
    args = DistillationArguments(str(tmp_path / "out"), use_cpu=True)
    student = Backbone(build(), n.half(), argument="student")
    with pytest.raises(ValueError, match=f"^student=.* would not load once it is saved: .*{message}.*from_module"):
        rehearse(student, load_backbone(networks.teacher).freeze(), args)


@pytest.mark.parametrize("kind", ["beit_without_pooler", "vit", "beit"])
@pytest.mark.parametrize("most", [0, MOST_COPIED])
def test_parts_that_no_embedding_reads_may_differ(monkeypatch, kind, most):
    """A classifier's backbone without pooler, and the token that hides patches, are no reason to refuse a student."""
    monkeypatch.setattr("coss_hf.trainer.reloading.MOST_COPIED", most)
    network = ViTModel(ViTConfig(**n.SMALL), use_mask_token=True) if kind == "vit" else n.build(kind)
    check_saving(Backbone(network, n.half()))


def test_weights_that_are_not_finite_are_no_matter_of_the_structure(networks):
    student = load_backbone(networks.small)
    nn.init.constant_(next(student.model.parameters()), float("nan"))
    check_saving(student)  # the loss says so


def test_remedies_name_what_helps():
    """Each student was told to correct its config, or to be given as the module that it was."""
    pooled = Data2VecVisionForImageClassification(Data2VecVisionConfig(**n.SMALL))
    with pytest.raises(ValueError, match=r"alone has pooler\.layernorm[^.]*\..* pooling='mean'\)\.$"):
        check_saving(Backbone(pooled, n.half()))
    check_saving(Backbone(pooled, n.half(), pooling="mean"))
    module = encoder()
    module.load_state_dict = lambda *args, **options: 1 / 0
    with pytest.raises(ValueError, match=r"load_state_dict fails .*\. Give a module whose state_dict\(\) holds"):
        check_saving(Backbone.from_module(module, **INPUT))
    with pytest.raises(ValueError, match=r"fails .*\. Give it as Backbone\.from_module"):
        check_saving(Backbone(Unregistered(UnregisteredConfig(**n.SMALL)), n.half()))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_no_fault_of_the_student(networks, monkeypatch, caplog, error):
    def fail(*args):
        raise error

    monkeypatch.setattr("coss_hf.trainer.reloading.save_network", fail)
    check_before_training(load_backbone(networks.small))
    assert "is not checked before the training" in caplog.text


def test_only_the_first_process_copies_the_student(tmp_path, networks, monkeypatch):
    checked = []
    monkeypatch.setattr(rehearsal, "check_before_training", lambda *args, **options: checked.append(1))
    monkeypatch.setattr(rehearsal, "try_trainer", lambda *args: None)
    for rank in (0, 1):
        args = DistillationArguments(str(tmp_path / "out"), use_cpu=True)
        monkeypatch.setattr(DistillationArguments, "process_index", rank)
        rehearse(load_backbone(networks.small), load_backbone(networks.teacher).freeze(), args)
    assert checked == [1]


@pytest.mark.parametrize("most", [0, MOST_COPIED])
def test_the_check_leaves_nothing_behind(tmp_path, monkeypatch, capfd, most):
    """Each run left a folder of the project's code in the cache of modules, and told where a config was saved."""
    monkeypatch.setattr("coss_hf.trainer.reloading.MOST_COPIED", most)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    transformers.logging.set_verbosity_info()
    try:
        for _ in range(2):
            check_saving(Backbone(CifarResNetModel(CifarResNetConfig(depth=8)), n.half()))
            check_saving(Backbone(n.build("vit"), n.half()))
    finally:
        transformers.logging.set_verbosity_warning()
    assert "saved in" not in capfd.readouterr().err
    cached = [path.name for path in tmp_path.glob("transformers_modules/*/")]
    assert set(cached) - {"__pycache__"} <= {"coss_hf_student"}


# ---- the check after the last save ----


def damage_processor(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.9] * 3}))


def damage_weights(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "conv" in name)
    save_file(
        weights | {name: torch.zeros_like(weights[name])}, folder / "model.safetensors", metadata={"format": "pt"}
    )


def damage_head(folder):
    weights = load_file(folder / "head.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "head.safetensors")


DAMAGE = {
    "no processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "AutoImageProcessor"),
    "another processor": (damage_processor, "pixels of its image processor differ"),
    "other weights": (damage_weights, "embeddings differ from those of the trained student by"),
    "no code": (lambda folder: (folder / "modeling_cifar_resnet.py").unlink(), "AutoModel.from_pretrained fails"),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "AutoModel.from_pretrained fails"),
    "another head": (damage_head, "outputs of its head differ"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    images = h.write_images(folder / "images")
    teacher = h.save_resnet(folder / "teacher", seed=1)
    run = build(folder, images, teacher, h.save_resnet(folder / "student", seed=2, hidden_sizes=(4, 4, 8)))
    run.train()
    return run, folder


@pytest.mark.parametrize("case", DAMAGE)
def test_a_folder_that_does_not_load_ends_the_run(finished, tmp_path, case):
    from coss_hf.trainer.reloading import check_reload

    run, folder = finished
    damage, message = DAMAGE[case]
    copied = tmp_path / "student"
    shutil.copytree(folder / "out", copied, ignore=shutil.ignore_patterns("_lock"))
    rest = (run.trainer.student, run.trainer.full_model.head, run.trainer.splits.train, run.trainer.splits.image_column)
    check_reload(copied, *rest)
    damage(copied)
    before = {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()}
    with pytest.raises(NotReloadable, match=message) as raised:
        check_reload(copied, *rest)
    assert "Everything is kept" in str(raised.value)
    assert {path.name: path.read_bytes() for path in copied.iterdir() if path.is_file()} == before


def test_missing_images_do_not_fail_the_reload_check(finished, monkeypatch):
    from coss_hf.trainer import reloading

    def gone(record):
        raise FileNotFoundError("image")

    run, folder = finished
    monkeypatch.setattr(reloading, "decode", gone)
    rest = (run.trainer.student, run.trainer.full_model.head, run.trainer.splits.train, run.trainer.splits.image_column)
    reloading.check_reload(folder / "out", *rest)


def test_an_untrained_pooler_ends_the_run(tmp_path, image_parquet, networks):
    """`pooler_output` of a ViT student was noise: AutoModel builds a pooler that no checkpoint of its kind has."""
    from coss_hf.trainer.reloading import check_reload

    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.vit, max_steps=1)
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(weights["pooler.dense.weight"], torch.eye(16)) and not weights["pooler.dense.bias"].any()
    random = {"pooler.dense.weight": torch.randn(16, 16)}
    save_file(weights | random, folder / "model.safetensors", metadata={"format": "pt"})
    rest = (trainer.student, trainer.full_model.head, trainer.splits.train, trainer.splits.image_column)
    with pytest.raises(NotReloadable, match="values of pooler_output differ"):
        check_reload(folder, *rest)
    load_student(trainer.full_model, type(trainer.student.model), str(folder))  # as a checkpoint of an earlier version
    trainer.student.model.pooler.dense.weight.requires_grad_(False).normal_()
    trainer.save_model()
    check_reload(folder, *rest)
    save_file(weights | random, folder / "model.safetensors", metadata={"format": "pt"})
    trainer.student.set_pooling("mean")
    with pytest.raises(NotReloadable, match="it has a pooler that was not trained"):
        check_reload(folder, *rest)


def test_an_older_timm_does_not_fail_a_good_student(tmp_path, monkeypatch, caplog):
    """Before 1.0.16 it cannot load a folder, which ended a run of hours as if its student was damaged."""
    import timm

    from coss_hf.trainer.reloading import check_reload

    n.save("timm_resnet", tmp_path / "published")
    student = load_backbone(str(tmp_path / "published")).freeze()
    coss_hf.Student(student).save_pretrained(tmp_path / "student")
    nothing = Dataset.from_dict({"image": []})
    check_reload(tmp_path / "student", student, None, nothing, "image")
    assert "install timm" not in caplog.text
    monkeypatch.setattr(timm, "__version__", "1.0.15")
    check_reload(tmp_path / "student", student, None, nothing, "image")
    assert "timm 1.0.15 cannot load the student's folder, which is not checked: install timm>=1.0.16" in caplog.text
