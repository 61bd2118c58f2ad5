import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoImageProcessor

from coss_hf.hub import export as module
from coss_hf.hub.export import (
    OTHER_OUTPUTS,
    OUTPUT,
    agreement,
    check_packages,
    export,
    int8_advice,
    open_file,
    write_graph,
)
from coss_hf.hub.export_folders import RECORD, exported_folders, warn_of_stale_exports, weights_digest
from coss_hf.hub.student import Student
from coss_hf.models.heads import projection_head
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.checkpoint_files import remove_earlier_run
from tests.helpers import networks
from tests.helpers.runs import ROOT

push_module = importlib.import_module("coss_hf.hub.push")  # the package has a function of this name


def load(name: str, folder, **options):
    networks.save(name, folder)
    return load_backbone(str(folder), **options).freeze()


# clip_vision has a value called `embedding` inside.
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("cifar_resnet", True),
        pytest.param("dinov2", True, marks=pytest.mark.slow),
        pytest.param("clip_vision", False, marks=pytest.mark.slow),
        pytest.param("timm_resnet", False, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_images_through_graph_and_head(tmp_path, name, head):
    backbone = load(name, tmp_path / "network")
    student = Student(backbone, projection_head("mlp", backbone.dim, 7, 9) if head else None)
    path = tmp_path / "m.onnx"
    write_graph(student, path)
    run = open_file(path, 1)
    for count in (1, 5):
        pixels = backbone.preprocess(networks.images(count))
        torch.testing.assert_close(run(pixels), student(pixels), rtol=1e-4, atol=1e-4)
    assert run(pixels).shape == (5, 7 if head else backbone.dim)
    # Optimum and Transformers.js read other names.
    onnx, onnxruntime = module.onnx_packages()
    assert [output.name for output in onnx.load(path).graph.output] == [OUTPUT, *OTHER_OUTPUTS]
    rows = onnxruntime.InferenceSession(path).run(None, {"pixel_values": pixels.numpy()})
    assert all(np.array_equal(row, rows[0]) for row in rows)


@pytest.mark.parametrize(
    "name, kind", [("cifar_resnet", "static"), pytest.param("timm_vit", "dynamic", marks=pytest.mark.slow)]
)
def test_int8_model_agrees_with_pytorch(tmp_path, name, kind):
    backbone = load(name, tmp_path / "network")
    pixels = backbone.preprocess(networks.images(12))
    batches = list(pixels.split(5))
    results = export(
        Student(backbone), tmp_path / "out", images=batches, calibration=batches, quantization=kind, rounds=1
    )
    own = "config.json" if name.startswith("timm") else "preprocessor_config.json"
    files = {"model.onnx", "model_int8.onnx", own}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert results["pytorch"]["cosine_min"] == pytest.approx(1) and results["onnx"]["overlap10"] == 1
    assert 0.95 < results["int8"]["cosine_min"] <= results["int8"]["cosine_mean"] < 1 - 1e-7
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert torch.equal(processor(networks.images(12), return_tensors="pt")["pixel_values"], pixels)
    onnx, _ = module.onnx_packages()
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "out" / "model_int8.onnx")).graph.node}
    assert "DynamicQuantizeLinear" in kinds if kind == "dynamic" else "QuantizeLinear" in kinds
    assert "BatchNormalization" not in kinds
    assert results["int8"]["batch_64"]["ms"] > 0


def test_export_that_disagrees_with_pytorch_writes_nothing(tmp_path, monkeypatch):
    backbone, out = load("cifar_resnet", tmp_path / "network"), tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_text("older")
    real = module.write_graph

    def other(student, path):
        real(Student(load("cifar_resnet", tmp_path / "other"), projection_head("linear", 16, 16)), path)

    monkeypatch.setattr(module, "write_graph", other)
    images = [backbone.preprocess(networks.images(3))]
    with pytest.raises(ValueError, match="below 0.9999"):
        export(Student(backbone), out, images=images, rounds=1)
    assert [path.name for path in out.iterdir()] == ["model.onnx"] and (out / "model.onnx").read_text() == "older"


def test_dynamic_quantization_rejects_networks_without_matrix_products(tmp_path, monkeypatch):
    """It did after the graph was written, which takes minutes for a large network."""
    backbone = load("cifar_resnet", tmp_path / "network")
    with pytest.raises(ValueError, match="--quantize static"):
        export(Student(backbone), tmp_path / "out", images=[], quantization="dynamic")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "_has_matrix_products", lambda student: True)  # as of a plain module
    with pytest.raises(ValueError, match="--quantize static"):
        export(Student(backbone), tmp_path / "out", images=[], quantization="dynamic")
    assert not list((tmp_path / "out").iterdir())


def test_agreement_equals_calculation_by_hand():
    a, b = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 1]])
    found = agreement(a, b)
    assert found["cosine_min"] == pytest.approx(np.sqrt(0.5)) and found["overlap10"] is None
    assert found["cosine_mean"] == pytest.approx((1 + np.sqrt(0.5)) / 2)


def test_a_head_of_another_dimension_and_missing_packages(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="do not fit the head"):
        Student(load("cifar_resnet", tmp_path / "network"), projection_head("linear", 5, 5))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"^The export needs onnxruntime, .*: pip install 'coss-hf\[export\]'\.$"):
        module.onnx_packages()


def measured(one: float, many: float) -> dict:
    float32 = {"bytes": 400, "batch_1": {"ms": 10.0}, "batch_64": {"ms": 100.0}}
    return {"onnx": float32, "int8": {"bytes": 100, "batch_1": {"ms": one}, "batch_64": {"ms": many}}}


@pytest.mark.parametrize(
    ("one", "many", "words"),
    [
        (93, 930, ["9.3 times slower for one image and 9.3 times slower for 64 images", "do not ship model_int8.onnx"]),
        (5, 200, ["2.0 times slower for 64 images", "2.0 times faster for one image: ship model_int8.onnx only for"]),
        (5, 25, ["int8 is 2.0 times faster for one image and 4.0 times faster for 64 images."]),
    ],
)
def test_slow_int8_model_is_reported(one, many, words):
    """Static int8 of a MobileNetV3 was 9.3 times slower than float32, and only a number in a table said so."""
    advice = int8_advice(measured(one, many))
    for part in words:
        assert part in advice, advice
    assert ("do not ship" in advice) == (one > 10 and many > 100)


def test_advice_needs_an_int8_file():
    assert int8_advice({"onnx": {}}) == ""


# ---- the Hub's layout, and other runtimes ----


def student_folder(folder, name: str = "dinov2", head: bool = True):
    """A student as a run leaves it."""
    backbone = load(name, folder)
    student = Student(backbone, projection_head("linear", backbone.dim, 7) if head else None)
    student.save_pretrained(folder)
    pixels = backbone.preprocess(networks.images(12))
    return student, list(pixels.split(5))


# Without this package: what each loader reads is named where it comes from.
ELSEWHERE = """
import sys
sys.modules["coss_hf"] = None
from pathlib import Path
import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

folder = Path(sys.argv[1])
images = [Image.open(path) for path in sorted(folder.glob("*.png"))]
pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="np")["pixel_values"]
session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx")
rows = session.run(None, {"pixel_values": pixels})
named = dict(zip((output.name for output in session.get_outputs()), rows))
# ORTModelForFeatureExtraction.forward, optimum-onnx: model_outputs["last_hidden_state"].
# ImageFeatureExtractionPipeline._call, Transformers.js: pool ? pooler_output
#     : last_hidden_state ?? logits ?? image_embeds.
assert all(np.array_equal(named[name], rows[0]) for name in ("embedding", "last_hidden_state", "pooler_output"))
session = onnxruntime.InferenceSession(folder / "onnx" / "model_int8.onnx")
(small,) = session.run(["pooler_output"], {"pixel_values": pixels})
np.savez(sys.argv[2], float32=rows[0], int8=small)
"""


def cosines(a, b) -> np.ndarray:
    return torch.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b)).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A student with ONNX files in its folder, and four images there."""
    folder = tmp_path_factory.mktemp("exported") / "student"
    student, batches = student_folder(folder)
    before = {path.name for path in folder.iterdir()}
    export(student, folder, images=batches, calibration=batches, quantization="static", rounds=1, hub_layout=True)
    assert {path.name for path in folder.iterdir()} == before | {"onnx"}
    assert {path.name for path in (folder / "onnx").iterdir()} == {"model.onnx", "model_int8.onnx"}
    for i, image in enumerate(networks.images(4)):
        image.save(folder / f"{i}.png")
    return folder, student.encode(networks.images(4)).numpy()


@pytest.mark.slow
def test_files_on_the_hub_give_the_students_embedding_without_this_package(exported, tmp_path):
    folder, expected = exported
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "found.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert cosines(found["float32"], expected).min() > 0.9999 and cosines(found["int8"], expected).min() > 0.95


def test_optimum_gives_the_students_embedding(exported):
    runtime = pytest.importorskip("optimum.onnxruntime.modeling", reason="needs optimum-onnx", exc_type=ImportError)
    folder, expected = exported
    inputs = AutoImageProcessor.from_pretrained(folder)(networks.images(4), return_tensors="pt")
    for options in ({"subfolder": "onnx", "file_name": "model.onnx"}, {}):
        model = runtime.ORTModelForFeatureExtraction.from_pretrained(folder, **options)
        assert cosines(model(**inputs).last_hidden_state, expected).min() > 0.9999
    outputs = runtime.ORTModelForCustomTasks.from_pretrained(folder, subfolder="onnx")(**inputs)
    assert cosines(outputs["embedding"], expected).min() > 0.9999


@pytest.mark.parametrize("name", ["cifar_resnet", "clip_vision", "timm_vit"])
def test_openvino_gives_the_students_embedding(tmp_path, name):
    openvino = pytest.importorskip("openvino")
    student, batches = student_folder(tmp_path, name)
    results = export(student, tmp_path, images=batches, rounds=1, formats=["openvino"], hub_layout=True)
    written = tmp_path / "openvino"
    assert {path.name for path in written.iterdir()} == {"openvino_model.xml", "openvino_model.bin"}
    assert not (tmp_path / "onnx").exists() and not (tmp_path / "model.onnx").exists()
    assert results["openvino"]["bytes"] == sum(path.stat().st_size for path in written.iterdir())
    assert results["openvino"]["cosine_min"] > 0.9999 and results["openvino"]["overlap10"] == 1
    compiled = openvino.Core().compile_model(written / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = torch.cat(batches)
    for count in (1, 12):
        found = compiled(pixels[:count].numpy())
        for output in ("embedding", *OTHER_OUTPUTS):
            assert cosines(found[output], student(pixels[:count])).min() > 0.9999


@pytest.mark.parametrize("name", ["cifar_resnet", "dinov2", "timm_vit"])
def test_executorch_gives_the_students_embedding(tmp_path, name):
    runtime = pytest.importorskip("executorch.runtime")
    student, batches = student_folder(tmp_path, name)
    results = export(student, tmp_path, images=batches, rounds=1, formats=["executorch"], hub_layout=True)
    assert [path.name for path in (tmp_path / "executorch").iterdir()] == ["model.pte"]
    assert results["executorch"]["cosine_min"] > 0.9999
    method = runtime.Runtime.get().load_program(tmp_path / "executorch" / "model.pte").load_method("forward")
    pixels = batches[0][:1]
    assert cosines(method.execute([pixels])[0], student(pixels)).min() > 0.9999


@pytest.mark.parametrize(("kind", "words"), [("openvino", "OpenVINO model's"), ("executorch", "ExecuTorch program's")])
def test_other_formats_that_disagree_with_pytorch_write_nothing(tmp_path, monkeypatch, kind, words):
    student, batches = student_folder(tmp_path, "cifar_resnet")
    before = {path.name for path in tmp_path.iterdir()}
    for writer in ("write_graph", "write_openvino", "write_program"):
        monkeypatch.setattr(module, writer, lambda source, path: path.write_text("any"))
    monkeypatch.setattr(module, "_open", lambda name, path: lambda pixels: student(pixels).flip(1))
    with pytest.raises(ValueError, match=f"the {words} embeddings have a cosine of .* nothing was written"):
        export(student, tmp_path, images=batches, rounds=1, formats=[kind], hub_layout=True)
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("kind", "package"), [("openvino", "openvino"), ("executorch", "executorch.exir")])
def test_missing_package_names_its_extra(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^--formats {kind} needs .*: pip install 'coss-hf\[{kind}\]'\.$"):
        check_packages([kind])
    setup = (ROOT / "setup.py").read_text()
    assert f'"{kind}": [' in setup


# ---- whether exported files are those of the present weights ----


def test_exported_files_belong_to_the_weights_that_they_were_made_from(tmp_path, caplog):
    student_folder(tmp_path)
    for name in ("onnx", "openvino"):
        (tmp_path / name).mkdir()
    (tmp_path / "onnx" / "model.onnx").write_text("graph")
    (tmp_path / "openvino" / "openvino_model.xml").write_text("model")
    (tmp_path / "openvino" / "notes.txt").write_text("mine")
    for name, weights in (("onnx", weights_digest(tmp_path)), ("openvino", "others")):
        (tmp_path / name / RECORD).write_text(json.dumps({"weights": weights}))
    assert exported_folders(tmp_path) == (["onnx"], ["openvino"])
    warn_of_stale_exports(tmp_path)
    assert "the files in openvino were exported from other weights" in caplog.text
    (tmp_path / "head.safetensors").write_text("of other weights")
    assert exported_folders(tmp_path) == ([], ["onnx", "openvino"])
    args = SimpleNamespace(overwrite_output_dir=True, process_index=0, output_dir=str(tmp_path))
    remove_earlier_run(args, None)
    assert not (tmp_path / "onnx").exists() and [path.name for path in (tmp_path / "openvino").iterdir()] == [
        "notes.txt"
    ]
    assert exported_folders(tmp_path) == ([], [])


def test_exported_files_are_pushed_with_their_weights_alone(tmp_path, monkeypatch, caplog):
    """What a training left before is not published as if it were this student."""
    student_folder(tmp_path)
    for name, weights in (("onnx", weights_digest(tmp_path)), ("executorch", None), ("checkpoint-4", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD).write_text(json.dumps({"weights": weights}))
    for file in ("onnx/model.onnx", "executorch/model.pte", "checkpoint-4/config.json", "training_args.bin"):
        (tmp_path / file).write_text("any")
    there = ["onnx/model.onnx", "onnx/model_int8.onnx", "onnx/notes.txt", "openvino/openvino_model.bin", "data/x.bin"]
    given = {}

    class Api:
        def __init__(self, token):
            pass

        def list_repo_files(self, repo_id, revision):
            return there

        def upload_folder(self, **options):
            given.update(options)
            return SimpleNamespace(repo_url="me/x", oid="1")

    monkeypatch.setattr(push_module, "HfApi", Api)
    monkeypatch.setattr(push_module, "_open_repo", lambda api, repo_id, *options: repo_id)
    push_module.push(tmp_path, "me/x")
    paths = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    pushed = {
        *filter_repo_objects(paths, allow_patterns=given["allow_patterns"], ignore_patterns=given["ignore_patterns"])
    }
    assert pushed >= {"config.json", "model.safetensors", "head.safetensors", "onnx/model.onnx", "onnx/export.json"}
    assert not [path for path in pushed if path.startswith(("executorch", "checkpoint-4", "training_args"))]
    assert f"{tmp_path / 'executorch'} is not pushed" in caplog.text
    # Files of an earlier push that the new record does not describe, or that have no record, go, and are named.
    gone = {*filter_repo_objects(there, allow_patterns=given["delete_patterns"])}
    assert gone == {"onnx/model_int8.onnx", "openvino/openvino_model.bin"}
    assert "me/x: this push deleted onnx/model_int8.onnx, openvino/openvino_model.bin, since" in caplog.text
