"""What a card promises of each library holds for the student that it is written for."""

import ast
import base64
import io
import json
import re
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from transformers import pipeline

import coss_hf
import tests.helpers.networks as n
from coss_hf.hub import sentence_modules
from coss_hf.hub.export_folders import FILES, RECORD, weights_digest
from coss_hf.hub.snippets import LOADERS, Subject, renamed, renewed, usage
from coss_hf.hub.student import Student
from coss_hf.models.backbone import Backbone
from coss_hf.models.from_module import torchvision_name, without_classifier
from coss_hf.models.loading import load_backbone

CODE = {loader.title: loader for loader in LOADERS}
pushing = sys.modules["coss_hf.hub.push"]  # a function has this name, too
PLAIN = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def student(network: str, pooling: str = "auto") -> Backbone:
    return Backbone(n.build(network), n.half(), pooling=pooling).freeze()


def remark(title: str, given: Subject) -> str:
    return CODE[title].remark(given, CODE[title].code(given))


def subject(made: Backbone, name: str = "me/it", **options) -> Subject:
    return Subject(name, made, None, Path(name), **options)


def timm_student(folder: Path, network: str = "timm_vit", pooling: str = "auto") -> Backbone:
    n.save(network, folder)
    return load_backbone(str(folder), pooling=pooling).freeze()


def run(code: str, image) -> dict:
    names = {"picture": image}
    exec(re.sub(r"(?m)^image = .*", "image = picture", code), names)
    return names


def test_half_precision_gives_the_embedding_of_the_pipeline(tmp_path):
    """The pipeline computes in the data type of the weights, whose pixels differ from those that were trained on."""
    made = student("dinov2")
    made.model.to(torch.bfloat16)
    Student(made).save_pretrained(tmp_path)
    given = subject(made, str(tmp_path))
    assert "They compute in bfloat16, as the weights are kept." in usage(given)
    [image] = n.images(1)
    found = run(CODE["Pipeline"].code(given), image)["embedding"]
    assert found.dtype == torch.float32
    expected = run(CODE["Transformers"].code(given), image)["embedding"]
    torch.testing.assert_close(found, expected)
    made.model.float()
    assert "dtype" not in CODE["Pipeline"].code(given) and "compute in" not in usage(given)


def imported(code: str) -> set[str]:
    """Top-level names of the modules that a code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def named(requirements: list[str]) -> set[str]:
    """Names of packages without their versions and extras."""
    return {re.match(r"[\w-]+", requirement)[0].lower() for requirement in requirements}


def exported_subject(made: Backbone, folder: Path, space: str) -> Subject:
    """A student in a space of texts, with exported files, which nothing reads."""
    made.model.config.teacher_space = {"teacher": "t", "revision": None, "dim": made.dim, "head": False, "space": space}
    Student(made).save_pretrained(folder)
    for name, (file, *_) in FILES.items():
        (folder / name).mkdir()
        (folder / name / file).write_text("")
        (folder / name / RECORD).write_text(json.dumps({"weights": weights_digest(folder)}))
    return Subject("me/it", made, None, folder)


@pytest.mark.parametrize("network", ["vit", "timm_vit", "timm_resnet", "resnet18", "own"])
def test_remarks_name_all_packages_that_their_code_needs(tmp_path, network):
    """Code for ONNX Runtime imported Transformers and Pillow, and nothing said so; students of timm need timm."""
    if network == "own":
        made = Backbone.from_module(PLAIN, size=32, mean=0.5, std=0.25).freeze()
    elif network == "resnet18":
        made = Backbone.from_module(models.resnet18()).freeze()
    else:
        made = timm_student(tmp_path / "published", network) if "timm" in network else student(network)
    given = exported_subject(made, tmp_path / "student", "projected")
    packages = {"PIL": "pillow", "coss_hf": "coss-hf", "sentence_transformers": "sentence-transformers"}
    packages["optimum"] = "optimum-onnx"
    brought = named([one for one in metadata.requires("coss-hf") if "extra ==" not in one])
    shown = [loader for loader in LOADERS if loader.why_not(given) == "" and loader.language == "python"]
    assert {"coss_hf", "Search by text", "ONNX Runtime", "OpenVINO", "ExecuTorch"} <= {one.title for one in shown}
    for loader in shown:
        code = loader.code(given)
        needed = {packages.get(name, name) for name in imported(code)}
        if 'return_tensors="pt"' in code:
            needed.add("torch")
        if "timm" in network:
            needed.add("timm")
        sentence = re.match(r"Needs (`[^`]+`(, | and )?)+", loader.remark(given, code))[0]
        told = named(re.findall("`([^`]+)`", sentence))
        assert needed <= told | (brought if "coss-hf" in told else set()), loader.title
        assert told <= needed | {"torch"}, loader.title


def test_an_image_in_base64_as_endpoints_send_it(tmp_path):
    made = student("vit")
    Student(made).save_pretrained(tmp_path)
    assert "default handler is this pipeline" in usage(subject(made))
    [image] = n.images(1)
    file = io.BytesIO()
    image.save(file, "PNG")
    extractor = pipeline("image-feature-extraction", model=str(tmp_path))
    found = torch.tensor(extractor(base64.b64encode(file.getvalue()).decode(), pool=True))
    torch.testing.assert_close(found, coss_hf.embed(made, [image]), rtol=1e-4, atol=1e-5)


def test_endpoints_are_not_promised_where_they_need_code_or_timm(tmp_path):
    made = student("cifar_resnet")
    made.model.config.auto_map = {"AutoModel": "modeling_cifar_resnet.CifarResNetModel"}
    text = remark("Pipeline", subject(made))
    assert "Endpoints do not run its code by themselves" in text and "default handler" not in text
    text = remark("Pipeline", subject(timm_student(tmp_path, "timm_resnet")))
    assert "with `timm` installed" in text and "default handler" not in text


@pytest.mark.parametrize(
    ("network", "pooling", "words"),
    [
        ("dinov2", "mean", "it is another vector, which was not trained to resemble"),
        ("beit", "mean", "it is another vector, which was not trained to resemble"),
        ("vit", "mean", "its pooler was not trained, and is zero"),
    ],
)
def test_the_card_says_what_pooler_output_is(network, pooling, words):
    """DINOv2's is its class token, and the card said nothing of it."""
    text = usage(subject(student(network, pooling)))
    assert re.search(rf"\* Pipeline: with `pool=True` it returns `pooler_output`, which .*`mean`.*{words}", text)


def test_torchvisions_builder_is_named_only_where_it_builds_the_same():
    """Inception changes its pixels with ``transform_input``, which published weights set and its repr does not show."""
    with torch.device("meta"):
        build = models.inception_v3
        plain, _ = without_classifier(build(init_weights=False))
        changed, _ = without_classifier(build(init_weights=False, transform_input=True))
    assert torchvision_name(plain) == "inception_v3"
    assert torchvision_name(changed) is None


def test_a_function_that_cannot_be_named_leaves_code_that_compiles():
    """``<lambda>`` and ``make.<locals>.read`` were printed into the code."""

    def nested(output):
        return output

    for function in (lambda output: output, nested, nn.functional.normalize):
        made = Backbone.from_module(PLAIN, size=32, mean=0.5, std=0.25, embedding=function)
        for title in ("PyTorch", "coss_hf"):
            code = CODE[title].code(subject(made))
            compile(code, title, "exec")
            line = next(line for line in code.splitlines() if line.startswith("read = "))
            assert line == f"read = ...  # {function.__qualname__}, the function that it was trained with as embedding="
        assert "embedding = read(output)" in CODE["PyTorch"].code(subject(made))
        assert "embedding=read," in CODE["coss_hf"].code(subject(made))


def test_a_pushed_card_loads_from_the_hub_whatever_lies_here(tmp_path, monkeypatch):
    """A folder of the repository's name in the working folder made the published code load a folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "it").mkdir(parents=True)
    made = timm_student(tmp_path / "published")
    here = usage(subject(made, "me/it"))
    there = usage(subject(made, "me/it", on_hub=True))
    assert '"local-dir:" + name' in here and '"hf-hub:" + name' in there
    assert renamed(here, "me/it", on_hub=True) == there


def test_the_mean_without_one_token_names_its_size():
    """The number of patches is in the weights of a dense layer."""
    assert "for images of 32 x 32 pixels alone" in remark("sentence-transformers", subject(student("dinov2", "mean")))
    for made in (student("dinov2"), student("dinov2_registers", "mean"), student("resnet")):
        assert "alone" not in remark("sentence-transformers", subject(made))


def test_a_map_whose_mean_is_pooler_output_needs_no_code(tmp_path):
    made = timm_student(tmp_path, "timm_swin", "gap")
    assert not sentence_modules.needs_code(made)
    [network] = sentence_modules.stages(made, None)
    assert network.config["modality_config"]["image"]["method_output_name"] == "pooler_output"


def test_files_of_another_student_do_not_stay(tmp_path, monkeypatch):
    """Of a ViT, in a folder and on the Hub, when a student of timm without a head took its place."""
    Student(student("vit")).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(3, 96)}, tmp_path / "head.safetensors", metadata={"format": "pt"})
    made = timm_student(tmp_path.with_name("published"), "timm_resnet")
    made.model.config.teacher_space = {"teacher": "t", "revision": None, "pooling": "pooler", "dim": 96, "head": False}
    Student(made).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    [image] = n.images(1)
    torch.testing.assert_close(Student.from_pretrained(tmp_path).encode([image]), coss_hf.embed(made, [image]))

    class Api:
        def __init__(self, **options):
            pass

        def upload_folder(self, **options):
            given.update(options)
            return type("Commit", (), {"repo_url": "", "oid": ""})

        def list_repo_files(self, repo_id, revision):
            return []

    given = {}
    monkeypatch.setattr(pushing, "HfApi", Api)
    monkeypatch.setattr(pushing, "_open_repo", lambda api, name, *rest: name)
    pushing.push(tmp_path, "me/it")
    there = [
        "preprocessor_config.json",
        "modeling_x.py",
        "configuration_x.py",
        "head.safetensors",
        "handler.py",
        "a.md",
    ]
    assert {*filter_repo_objects(there, allow_patterns=given["delete_patterns"])} == {*there[:4]}


@pytest.fixture
def uploads(monkeypatch) -> list[dict]:
    """What is uploaded of the folders that are pushed; nothing is on the Hub."""
    found = []

    def upload(self, **options):
        found.append(options | {"card": Path(options["folder_path"], "README.md").read_text()})
        return type("Commit", (), {"repo_url": "", "oid": ""})

    answers = {"upload_folder": upload, "list_repo_files": lambda self, repo_id, revision: []}
    api = type("Api", (), answers | {"create_branch": lambda self, repo_id, branch, exist_ok: None})
    monkeypatch.setattr(pushing, "HfApi", lambda **options: api())
    monkeypatch.setattr(pushing, "_open_repo", lambda api, name, *rest: name)
    return found


def test_an_image_processor_with_code_of_its_own_is_pushed_and_loaded_with_it(tmp_path, uploads):
    """Its code was left out, and the card loaded it without trust."""
    made = student("vit")
    Student(made).save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Student\n")
    path = tmp_path / "preprocessor_config.json"
    pushing.push(tmp_path, "me/it")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoImageProcessor": "own.Own"}}))
    pushing.push(tmp_path, "me/it")
    assert ["*.py" in one["allow_patterns"] for one in uploads] == [False, True]
    made.processor.auto_map = {"AutoImageProcessor": "own.Own"}  # of a checkpoint whose class Transformers has, too
    assert "trust" not in CODE["Transformers"].code(subject(made))
    made.processor.__class__ = type("Own", (type(made.processor),), {"_auto_class": "AutoImageProcessor"})
    codes = {title: CODE[title].code(subject(made)) for title in ("Transformers", "Pipeline", "sentence-transformers")}
    assert "AutoModel.from_pretrained(name)" in codes["Transformers"]
    assert "AutoImageProcessor.from_pretrained(name, trust_remote_code=True)" in codes["Transformers"]
    assert all("trust_remote_code=True" in code for code in (*codes.values(), CODE["coss_hf"].code(subject(made))))


def test_a_card_on_a_branch_loads_that_branch(tmp_path, uploads):
    """It loaded main, which may have another student, or none, at once or when its section on use was renewed."""
    made = {"vit": student("vit"), "timm": timm_student(tmp_path / "timm")}
    made["space"] = student("siglip_vision")
    for name, one in made.items():
        folder = tmp_path / f"{name} student"
        given = exported_subject(one, folder, "projected") if name == "space" else subject(one)
        if name != "space":
            Student(one).save_pretrained(folder)
        card = f"# It\n\n## Use\n\n{usage(given)}\n\n## Training\n"
        (folder / "README.md").write_text(card)
        for revision in ("v2", "v3", None):
            pushing.push(folder, "me/it", revision=revision)
            pushed = uploads[-1]["card"]
            codes = re.findall(r"```(python|javascript)\n(.*?)```", pushed, re.DOTALL)
            assert codes and (folder / "README.md").read_text() == pushed
            for language, code in codes:
                marks = re.findall(r'revision(?:="|: ")(\w+)"|"@(\w+)"', code)
                assert {a or b for a, b in marks} == ({revision} if revision else set()), code
                loads = re.findall(r"[( ]name[,)]|model=name|\+ name", code)
                assert len(marks) == (len(loads) if revision else 0), code
                if language == "python":
                    compile(code, "card", "exec")
            assert not revision or renewed(pushed, replace(given, on_hub=True)) == pushed, "of the same files"
        assert pushed.replace("student = coss_hf.load_backbone(name)", "student = name") == card
