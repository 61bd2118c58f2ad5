"""Architectures of one kind taught by another: distilled by the recipe, reloaded in a fresh process, compared."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextImageProcessor,
    Dinov2Config,
    MobileNetV2Config,
    MobileNetV2ImageProcessor,
    TimmWrapperConfig,
    ViTConfig,
    ViTImageProcessor,
)

import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.models.loading import load_backbone
from tests.helpers.processes import run as run_program

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

NETWORKS = {
    "vit": (ViTConfig(**SMALL, image_size=32, patch_size=8), ViTImageProcessor(size={"height": 32, "width": 32})),
    "dinov2": (
        Dinov2Config(**SMALL, image_size=56, patch_size=14),
        BitImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}),
    ),
    "convnext": (
        ConvNextConfig(hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1]),
        ConvNextImageProcessor(size={"shortest_edge": 64}),
    ),
    "timm": (TimmWrapperConfig(architecture="resnet10t"), None),
    "mobilenet": (
        MobileNetV2Config(depth_multiplier=0.25, image_size=40),
        MobileNetV2ImageProcessor(size={"shortest_edge": 44}, crop_size={"height": 40, "width": 40}),
    ),
}

FRESH = """
import json, sys
sys.modules["coss_hf"] = None  # not installed
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
folder, *images = sys.argv[1:]
model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
pixels = torch.cat([processor(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"] for path in images])
with torch.no_grad():
    output = model(pixel_values=pixels)
pooling = model.config.embedding_pooling
embedding = output.last_hidden_state[:, 0] if pooling == "cls" else output.pooler_output.flatten(1)
print(json.dumps([pooling, embedding.tolist()]))
"""


def save(folder, kind: str, seed: int) -> str:
    config, processor = NETWORKS[kind]
    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), [("vit", "timm"), ("dinov2", "mobilenet"), ("convnext", "vit")])
def test_pair(tmp_path, image_parquet, monkeypatch, teacher, student):
    words = {
        "teacher": save(tmp_path / "teacher", teacher, 1),
        "student": save(tmp_path / "student", student, 2),
        "dataset": str(image_parquet),
        "output_dir": str(tmp_path / "out"),
        "settings": "paper",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "neighbors_k": 1,
        "neighbors_pool": 4,
        "neighbors_cache": str(tmp_path / "neighbours"),
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    if student == "timm":
        words["student_size"] = 64  # timm's own 224 pixels take long
    monkeypatch.setattr(sys, "argv", ["distill.py", *(f"--{key}={value}" for key, value in words.items())])
    load_recipe("distill").main()

    images, _ = h.colour_images(3, seed=8, size=50)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for image, path in zip(images, paths):
        image.save(path)
    backbone = load_backbone(str(tmp_path / "out"))
    backbone.model.eval()
    with torch.no_grad():
        expected = backbone.features(backbone.preprocess(images)).embedding
    done = run_program(["-c", FRESH, tmp_path / "out", *paths], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pooling, found = json.loads(done.stdout)
    assert pooling == backbone.pooling
    # Three steps leave embeddings of any length: 1e-5 of the largest entry.
    largest = expected.abs().max().item()
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5 * max(largest, 1))
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in history if "loss" in line]
    assert len(losses) == 3 and all(abs(loss) < 1000 for loss in losses)
