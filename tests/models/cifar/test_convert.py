import io
import runpy
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from coss_hf.cli.pages import load_recipe
from coss_hf.models.cifar.convert import CIFAR10_LABELS, convert_akamaster

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "convert.py"


def accuracy(folder: Path, parquet: Path, rows: int) -> float:
    table = pyarrow.parquet.read_table(parquet).slice(0, rows)
    images = [Image.open(io.BytesIO(record["bytes"])).convert("RGB") for record in table["image"].to_pylist()]
    labels = torch.tensor(table["label"].to_pylist())
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        batches = [images[i : i + 250] for i in range(0, len(images), 250)]
        logits = [model(**processor(batch, return_tensors="pt")).logits for batch in batches]
    return (torch.cat(logits).argmax(1) == labels).float().mean().item()


@pytest.fixture(scope="module")
def resnet56(shared, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resnet56")
    main = runpy.run_path(str(RECIPE))["main"]
    main([str(shared / "teachers" / "cifar10-resnet56"), "--output", str(folder)])
    return folder


@pytest.mark.slow
def test_first_thousand_test_images(resnet56, shared):
    assert accuracy(resnet56, shared / "data" / "cifar10" / "test.parquet", 1000) == pytest.approx(0.832, abs=0.02)


@pytest.mark.slow
def test_accuracy_on_the_full_test_set(resnet56, shared):
    assert accuracy(resnet56, shared / "data" / "cifar10" / "test.parquet", 10_000) == pytest.approx(0.8320, abs=2e-4)


def test_written_folder_has_labels_and_a_64_dimensional_backbone(resnet56):
    model = AutoModelForImageClassification.from_pretrained(resnet56)
    assert [model.config.id2label[i] for i in range(10)] == CIFAR10_LABELS
    assert model.num_parameters() == 853_018
    assert AutoModel.from_pretrained(resnet56)(torch.randn(2, 3, 32, 32)).pooler_output.shape == (2, 64, 1, 1)


@pytest.mark.parametrize("name", ["resnet20", "resnet32"])
def test_agrees_with_a_forward_pass_on_the_original_keys(shared, name):
    weights = load_file(shared / "teachers" / f"cifar10-{name}" / "model.safetensors")

    def norm(x, name):
        values = [weights[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *values)

    x = inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    x = norm(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range((int(name[6:]) - 2) // 6):
            key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(F.conv2d(x, weights[f"{key}.conv1.weight"], stride=stride, padding=1), f"{key}.bn1").relu()
            y = norm(F.conv2d(y, weights[f"{key}.conv2.weight"], padding=1), f"{key}.bn2")
            if stride == 2:
                zeros = torch.zeros_like(y[:, : y.shape[1] // 4])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = (x + y).relu()
    expected = F.linear(x.mean((2, 3)), weights["linear.weight"], weights["linear.bias"])
    model = convert_akamaster(shared / "teachers" / f"cifar10-{name}")
    assert model.config.depth == int(name[6:])
    with torch.no_grad():
        torch.testing.assert_close(model(inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer2.1.bn1.weight"), "resnet.stages.1.1.bn1.weight"),
        (lambda w: w.update({"layer1.0.downsample.0.weight": torch.ones(1)}), "stages.0.0.downsample"),
        (lambda w: w.update({"linear.weight": torch.ones(100, 64)}), "classifier.weight"),
        (lambda w: [w.pop(key) for key in list(w) if key.startswith("layer1")], "layer1"),
    ],
)
def test_other_checkpoints_are_refused(shared, tmp_path, change, message):
    weights = load_file(shared / "teachers" / "cifar10-resnet20" / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert_akamaster(tmp_path)


def test_a_damaged_file_is_bad_input(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SystemExit) as stop:
        load_recipe("convert").main([str(tmp_path), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2 and "model.safetensors is damaged" in capsys.readouterr().err


def test_folder_without_weights_is_refused(shared, tmp_path):
    shutil.copy(shared / "teachers" / "cifar10-resnet20" / "README.md", tmp_path)
    with pytest.raises(ValueError, match="model.safetensors"):
        convert_akamaster(tmp_path)
