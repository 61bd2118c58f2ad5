import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from coss_hf.hub import export as module
from coss_hf.hub.export import agreement, export, int8_advice, open_file, write_graph
from coss_hf.hub.student import Student
from coss_hf.models.heads import projection_head
from coss_hf.models.loading import load_backbone
from tests.helpers import networks


def load(name: str, folder, **options):
    networks.save(name, folder)
    return load_backbone(str(folder), **options).freeze()


# clip_vision has a value called `embedding` inside.
@pytest.mark.parametrize(
    ("name", "head"), [("cifar_resnet", True), ("dinov2", True), ("clip_vision", False), ("timm_resnet", False)]
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


@pytest.mark.parametrize("name, kind", [("cifar_resnet", "static"), ("timm_vit", "dynamic")])
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


def test_dynamic_quantization_rejects_networks_without_matrix_products(tmp_path):
    backbone = load("cifar_resnet", tmp_path / "network")
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
    with pytest.raises(ValueError, match=r"onnxruntime.*pip install coss-hf\[export\]"):
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
