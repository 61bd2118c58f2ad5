import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import coss_hf
import tests.helpers.runs as h
from coss_hf.models.heads import projection_head
from tests.recipes.test_distill import ROOT, load_recipe

recipe = load_recipe("export")


def call(monkeypatch, *words, **options):
    words = [f"--{key}={value}" for key, value in options.items() if value is not None] + list(words)
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    recipe.main()


def test_record_and_snippet_of_the_documentation(tmp_path, image_parquet, monkeypatch, capsys):
    model, out = h.save_vit(tmp_path / "my-student", seed=2), tmp_path / "my-student" / "onnx"
    head = projection_head("linear", 16, 8)
    save_file(head.state_dict(), tmp_path / "my-student" / "head.safetensors")
    options = {"model": model, "output": out, "dataset": image_parquet, "num_images": 20, "timing_rounds": 1}
    call(monkeypatch, "--head", **options)
    assert json.loads((out / "export.json").read_text())["results"]["onnx"]["cosine_min"] > 0.9999
    call(monkeypatch, **options, quantize="static", calibration_images=10)
    record = json.loads((out / "export.json").read_text())
    assert record["images"] == 20 and record["bank"] == 48 and record["threads"] == torch.get_num_threads()
    for name in ("pytorch", "onnx", "int8"):
        row = record["results"][name]
        assert row["knn10"] > 0.5 and {"ms", "images_per_second"} == set(row["batch_1"])
        assert name == "pytorch" or row["bytes"] == (out / f"model{'_int8' * (name == 'int8')}.onnx").stat().st_size
    assert "| int8 |" in capsys.readouterr().out
    snippet = re.search(
        r"```python\n(import onnxruntime.*?)```", (ROOT / "docs" / "guides" / "export.md").read_text(), re.S
    ).group(1)
    images = h.colour_images(3, 5)[0]
    images[0].save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(snippet.replace("photo.jpg", "photo.png"), scope)
    expected = coss_hf.embed(model, images[0]).numpy()
    np.testing.assert_allclose(scope["embeddings"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"model": "no-such-model"}, "--model=no-such-model"),
        ({"dataset": "no-such-images"}, "--dataset no-such-images"),
        ({"dataset": None, "quantize": "static"}, "--dataset is missing"),
        ({"head": True}, "--head: there is no head.safetensors"),
        ({"output": "FILE"}, "is a file"),
        ({"output": "MODEL"}, "the model's own folder"),
        ({"num_images": 0}, "--num_images 0"),
        ({"quantize": "int4"}, "quantize"),
    ],
)
def test_bad_input(tmp_path, image_parquet, monkeypatch, capsys, replaced, message):
    model = h.save_resnet(tmp_path / "model")
    (tmp_path / "file").write_text("")
    options = {"model": model, "output": tmp_path / "out", "dataset": image_parquet} | replaced
    options["output"] = {"FILE": tmp_path / "file", "MODEL": model}.get(options["output"], options["output"])
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, **options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
