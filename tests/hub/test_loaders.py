"""Each library that the card names gives the student's embedding, by the card's own code, without this package.

A student was right through ``coss_hf`` alone: the pooler that ``AutoModel`` adds to a ViT was random, so that
``pooler_output``, the pipeline and Inference Endpoints gave noise; timm and sentence-transformers could not read it.
"""

import importlib
import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models
from transformers import AutoModel

import coss_hf
import tests.helpers.networks as n
from coss_hf.hub import sentence_modules
from coss_hf.hub.sentence_modules import NotExpressible, stages
from coss_hf.hub.snippets import LOADERS, Subject, renamed, usage
from coss_hf.hub.student import Student
from coss_hf.models.backbone import Backbone
from coss_hf.models.heads import projection_head
from coss_hf.models.image_processor import noise_image
from coss_hf.models.loading import load_backbone
from coss_hf.models.pooling import pool
from tests.helpers.processes import run as run_program

TEACHER_DIM = 24
OWN = "nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())"
STOCK = {"Transformers", "Pipeline", "sentence-transformers"}
NO_PIPELINE = STOCK - {"Pipeline"}


class Case(NamedTuple):
    """A student: its network, pooling and head, and the libraries that must give its embedding."""

    network: str
    pooling: str = "auto"
    head: str = "none"
    loaders: set[str] = STOCK
    options: dict = {}


CASES = {
    "cifar": Case("cifar_resnet", head="mlp"),
    "vit": Case("vit", head="mlp"),
    "vit, mean": Case("vit", "mean", "linear", NO_PIPELINE),
    "vit, larger images": Case("vit", head="linear", loaders=NO_PIPELINE, options={"size": 48}),
    "deit, mean": Case("deit", "mean", "linear", NO_PIPELINE),
    "convnext": Case("convnext"),
    "dinov2": Case("dinov2", head="linear"),
    "siglip, mean": Case("siglip_vision", "mean", "linear", NO_PIPELINE),
    "timm resnet": Case("timm_resnet", head="mlp", loaders=STOCK | {"timm"}),
    "timm vit, mean": Case("timm_vit", "mean", "linear", NO_PIPELINE),
    "torchvision": Case("shufflenet_v2_x0_5", head="linear", loaders={"PyTorch"}),
    "own module": Case("own", head="linear", loaders={"PyTorch"}),
}
MORE = {
    "vit without head": Case("vit"),
    "deit": Case("deit", head="linear"),
    "resnet": Case("resnet"),
    "swin": Case("swin", head="linear"),
    "mobilenet": Case("mobilenet_v2", head="linear"),
    "beit": Case("beit", head="linear"),
    "beit, mean": Case("beit_without_pooler", head="linear", loaders=NO_PIPELINE),
    "data2vec": Case("data2vec", head="linear", loaders=NO_PIPELINE),
    "dinov2, mean": Case("dinov2", "mean", "linear", NO_PIPELINE),
    "dinov2 with registers, mean": Case("dinov2_registers", "mean", "linear", NO_PIPELINE),
    "siglip": Case("siglip_vision", head="linear"),
    "clip": Case("clip_vision", head="linear"),
    "timm vit": Case("timm_vit", head="linear", loaders=STOCK | {"timm"}),
    "timm swin, gap": Case("timm_swin", "gap", "linear", STOCK | {"timm"}),
    "timm mobilenet": Case("timm_mobilenetv3", loaders=STOCK | {"timm"}),
    "torchvision resnet": Case("resnet18", head="mlp", loaders={"PyTorch"}),
    "torchvision vit": Case("vit_b_32", loaders={"PyTorch"}),
}

# Runs the code of each card on a picture, and prints the cosine of what it leaves as `embedding`.
PROGRAM = """
import sys
sys.modules["coss_hf"] = None  # every import of it fails
import importlib.util, json, re
from pathlib import Path
import torch
from safetensors.torch import load_file

installed = importlib.util.find_spec("sentence_transformers") is not None
found = {}
for folder in map(Path, sys.argv[1:]):
    expected = load_file(folder / "expected.safetensors")
    for part in (folder / "README.md").read_text().split("### ")[1:]:
        title, code = part.split("\\n")[0], re.search(r"```python\\n(.*?)```", part, re.S)
        if title == "coss_hf" or code is None or (title == "sentence-transformers" and not installed):
            continue
        code = re.sub(r"(?m)^image = .*", f"image = Image.open({str(folder / 'picture.png')!r})", code[1])
        code = re.sub(r"(?m)^module = \\.\\.\\..*", "from torch import nn; module = OWN", code)
        names = {}
        exec(code, names)
        embedding = torch.as_tensor(names["embedding"]).double()
        space = "teacher" if title == "sentence-transformers" else "own"
        assert embedding.shape == expected[space].shape, (folder, title, embedding.shape)
        cosine = torch.cosine_similarity(embedding, expected[space].double()).min().item()
        found.setdefault(folder.name, {})[title] = cosine
        if title == "sentence-transformers":
            found[folder.name]["similarity"] = float(names["similarity"])
print("FOUND", json.dumps(found))
""".replace("OWN", OWN)


def student(case: Case, folder: Path) -> Student:
    if case.network not in n.NETWORKS:
        torch.manual_seed(0)
        if case.network == "own":
            backbone = Backbone.from_module(eval(OWN), size=32, mean=0.5, std=0.25, pooling=case.pooling)
        else:
            backbone = Backbone.from_module(models.get_model(case.network), pooling=case.pooling)
    else:
        n.save(case.network, folder / "published")
        options = {"interpolate_pos_encoding": True, **case.options} if case.options else {}
        backbone = load_backbone(str(folder / "published"), pooling=case.pooling, argument="student", **options)
    torch.manual_seed(1)
    dim = backbone.dim if case.head == "none" else TEACHER_DIM
    head = projection_head(case.head, backbone.dim, dim, 40)
    space = {"teacher": "teacher", "revision": None, "pooling": "cls", "dim": dim, "head": head is not None}
    backbone.model.config.teacher_space = space
    return Student(backbone.freeze(), head)


def write(folder: Path, made: Student) -> None:
    """A student's folder with the part of its card that loads it, a picture, and what is to be computed of it."""
    made.save_pretrained(folder)
    (folder / "README.md").write_text(usage(Subject(str(folder), made.backbone, made.head, folder)))
    picture = noise_image(10, 8).resize((90, 70), Image.Resampling.BICUBIC)
    picture.save(folder / "picture.png")
    save_file(
        {"own": coss_hf.embed(made.backbone, [picture]), "teacher": made.encode([picture])},
        folder / "expected.safetensors",
    )


def saved(place: Path, cases: dict[str, Case]) -> dict[str, tuple[Student, Path]]:
    made = {}
    for number, (name, case) in enumerate(cases.items()):
        made[name] = student(case, place / f"{number}"), place / "saved" / name.replace(" ", "-").replace(",", "")
        write(made[name][1], made[name][0])
    return made


def measured(students: dict[str, tuple[Student, Path]]) -> dict[str, dict[str, float]]:
    """The cosine of each student by each library, in a fresh process."""
    done = run_program(["-c", PROGRAM, *(folder for _, folder in students.values())])
    assert "FOUND" in done.stdout and done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.split("FOUND")[1])
    print(json.dumps(found, indent=1))
    return {name: found[folder.name] for name, (_, folder) in students.items()}


def check(cosines: dict[str, float], loaders: set[str]) -> None:
    if not importlib.util.find_spec("sentence_transformers"):
        loaders = loaders - {"sentence-transformers"}
    assert cosines.keys() - {"similarity"} == loaders
    assert all(cosines[loader] >= 0.9999 for loader in loaders)
    assert cosines.get("similarity", 1) == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> dict[str, tuple[Student, Path]]:
    return saved(tmp_path_factory.mktemp("loaders"), CASES)


@pytest.fixture(scope="module")
def cosines(students) -> dict[str, dict[str, float]]:
    return measured(students)


@pytest.mark.parametrize("name", CASES)
def test_the_cards_code_gives_the_embedding(cosines, name):
    check(cosines[name], CASES[name].loaders)


@pytest.mark.slow
def test_the_cards_code_of_more_families(tmp_path):
    students = saved(tmp_path, MORE)
    cosines = measured(students)
    for name, case in MORE.items():
        check(cosines[name], case.loaders)
        check_modules(*students[name], case)


def test_sentence_transformers_is_among_them(cosines):
    pytest.importorskip("sentence_transformers", "6.2", reason="needs sentence-transformers>=6.2")
    assert "sentence-transformers" in cosines["vit"]


@pytest.mark.parametrize("name", CASES)
def test_the_cards_code_by_this_package(students, name):
    check_own_code(students[name][1])


@pytest.mark.parametrize("has_space", [True, False])
def test_a_student_with_code_of_its_own(tmp_path, own_code, has_space):
    """What was trained with ``--trust_remote_code`` could be loaded by Transformers alone."""
    backbone = load_backbone(str(own_code), argument="student", trust_remote_code=True)
    space = {"teacher": "teacher", "revision": None, "pooling": "gap", "dim": backbone.dim, "head": False}
    backbone.model.config.teacher_space = space if has_space else None
    folder = tmp_path / "student"
    write(folder, Student(backbone.freeze()))
    for load in (Student.from_pretrained, lambda name: coss_hf.embed(name, [noise_image(9, 9)])):
        with pytest.raises(ValueError, match="brings code of its own; read it, then allow it with .*trust_remote_code"):
            load(folder)
    check_own_code(folder)


def check_own_code(folder: Path) -> None:
    """The card's code by this package gives the embedding."""
    code = re.search(r"### coss_hf\n.*?```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    code = re.sub(r"(?m)^image = .*", f"image = Image.open({str(folder / 'picture.png')!r})", code)
    names = {}
    exec(re.sub(r"(?m)^module = \.\.\..*", f"from torch import nn; module = {OWN}", code), names)
    assert_same(names["embedding"], load_file(folder / "expected.safetensors")["teacher"])


@pytest.mark.parametrize("name", CASES)
def test_modules_of_sentence_transformers_compute_the_embedding(students, name):
    check_modules(*students[name], CASES[name])


def check_modules(made: Student, folder: Path, case: Case) -> None:
    """What the package documents of its modules, written out: where it is not installed, this is the check."""
    path = folder / "modules.json"
    assert path.is_file() == ("sentence-transformers" in case.loaders)
    if not path.is_file():
        assert sentence_modules.why_not(made.backbone, made.head)
        return
    network = json.loads((folder / "sentence_bert_config.json").read_text())
    image = Image.open(folder / "picture.png")
    backbone = load_backbone(str(folder))
    pixels = backbone.preprocess([image])
    with torch.no_grad():
        output = backbone.freeze().model(pixel_values=pixels, **made.backbone.options)
        value = getattr(output, network["modality_config"]["image"]["method_output_name"])
        value = value.flatten(2).transpose(1, 2) if value.dim() == 4 else value
        for entry in json.loads(path.read_text())[1:]:
            value = _run(value, folder / entry["path"], entry["type"].rpartition(".")[2])
    assert_same(value, made.encode([image]))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert torch.cosine_similarity(found.double(), expected.double()).min() >= 0.9999


def _run(value: torch.Tensor, folder: Path, kind: str) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    if kind == "PatchPooling":
        loaded = getattr(importlib.import_module("coss_hf.hub.patch_pooling"), kind).load(folder)
        return loaded({"token_embeddings": value})["sentence_embedding"]
    if kind == "Pooling":
        pooled = {"mean": value.mean(1), "cls": value[:, 0], "lasttoken": value[:, -1]}
        modes = config["pooling_mode"]
        return torch.cat([pooled[mode] for mode in ([modes] if isinstance(modes, str) else modes)], 1)
    weights = load_file(folder / "model.safetensors")
    value = nn.functional.linear(value, weights["linear.weight"], weights.get("linear.bias"))
    module, _, name = config["activation_function"].rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)()(value)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (nn.Sequential(nn.Linear(16, 8), nn.GELU(approximate="tanh"), nn.Linear(8, 24)), "has a GELU"),
        (nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 24)), "has a BatchNorm1d"),
        (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24)), "is a Sequential, no linear layers"),
        (nn.Sequential(), "is a Sequential, no linear layers"),
        (nn.Bilinear(16, 16, 24), "is a Bilinear"),
    ],
)
def test_heads_without_modules_are_named(students, head, reason):
    made, folder = students["cifar"]
    with pytest.raises(NotExpressible, match=f"its head .*{reason}"):
        stages(made.backbone, head)
    text = usage(Subject("me/it", made.backbone, head, folder))
    assert f"* sentence-transformers: its head {reason}" in text and "SentenceTransformer" not in text


def test_another_activation_becomes_a_module(students):
    backbone = students["cifar"][0].backbone
    head = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Tanh(), nn.Linear(8, 24))
    first, second = [stage.config for stage in stages(backbone, head)[-2:]]
    assert first["activation_function"] == "torch.nn.modules.activation.Tanh" and not first["bias"]
    assert second["activation_function"] == "torch.nn.modules.linear.Identity" and second["bias"]


def test_a_student_saved_again_replaces_the_modules(students, tmp_path):
    made, _ = students["cifar"]
    made.save_pretrained(tmp_path)
    assert sentence_modules.module_folders(tmp_path) == ["1_Pooling", "2_Dense", "3_Dense"]
    (tmp_path / "2_Views").mkdir()
    students["dinov2"][0].save_pretrained(tmp_path)
    assert sentence_modules.module_folders(tmp_path) == ["1_Dense"] and not (tmp_path / "2_Dense").exists()
    assert (tmp_path / "2_Views").is_dir(), "not ours"
    students["torchvision"][0].save_pretrained(tmp_path)
    assert sentence_modules.module_folders(tmp_path) == [] and not (tmp_path / "1_Dense").exists()


def test_the_card_says_why_a_library_is_missing(students):
    made, folder = students["vit, mean"]
    text = usage(Subject("me/it", made.backbone, made.head, folder))
    assert "* Pipeline: with `pool=True` it returns `pooler_output`, which" in text
    made, folder = students["timm vit, mean"]
    assert "* timm: its networks pool by themselves, and not by `mean`" in usage(
        Subject("me/it", made.backbone, made.head, folder)
    )
    made, folder = students["deit, mean"]
    assert "SentenceTransformer(name, trust_remote_code=True)" in usage(
        Subject("me/it", made.backbone, made.head, folder)
    )


def test_renaming_touches_the_code_alone(tmp_path):
    card = 'name = "a"\nx = timm.create_model("local-dir:" + name)\n`name = "a"`, "local-dir:" and\n    name = "a"\n'
    there = card.replace('name = "a"', 'name = "me/it"', 1)
    assert renamed(card, "me/it") == there.replace('"local-dir:" + name', '"hf-hub:" + name')
    back = renamed(renamed(card, "me/it"), str(tmp_path))
    assert '"local-dir:" + name' in back and f'name = "{tmp_path}"' in back.splitlines()
    assert renamed(card, r"me/\1") != card


def test_titles_differ():
    assert len({loader.title for loader in LOADERS}) == len(LOADERS)


@pytest.mark.parametrize("name", ["vit", "vit, mean", "siglip, mean", "timm vit, mean"])
def test_pooler_output_is_no_noise(students, name):
    """It is the embedding, zeros, nothing or what the checkpoint's pooler gives; never drawn at the loading."""
    made, folder = students[name]
    images = torch.randn(2, 3, *made.backbone.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = AutoModel.from_pretrained(folder).eval()(pixel_values=images)
    pooled = output.pooler_output
    if name == "vit":
        torch.testing.assert_close(pooled, pool(output, "cls", made.backbone.layout))
    else:
        assert pooled is None if "timm" in name else pooled.any() == ("siglip" in name)
    torch.testing.assert_close(
        pool(output, made.backbone.pooling, made.backbone.layout), made.backbone.features(images).embedding
    )
