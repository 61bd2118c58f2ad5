import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import coss_hf
import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.hub.export_folders import exported_folders, weights_digest
from coss_hf.hub.snippets import renamed
from coss_hf.models.heads import projection_head
from coss_hf.models.loading import load_backbone
from tests.helpers.runs import ROOT

recipe = load_recipe("export")


def call(monkeypatch, *words, **options):
    words = [f"--{key}={value}" for key, value in options.items() if value is not None] + list(words)
    monkeypatch.setattr(sys, "argv", ["export.py", *words])
    recipe.main()


@pytest.mark.slow
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
        ({"num_train_images": 0}, "--num_train_images 0"),
        ({"formats": "tflite"}, "--formats tflite: give one or more of onnx, openvino, executorch"),
        (
            {"formats": "openvino", "quantize": "static"},
            "--quantize static is for the ONNX file: add onnx to --formats",
        ),
        ({"quantize": "int4"}, "quantize"),
        # In the model's folder they would be taken for its own embedding.
        ({"output": None, "pooling": "cls"}, "--pooling cls: files in the model's own folder give its own embedding"),
        # The image processor of another student was replaced.
        ({"output": "OTHER"}, "contains a network, whose image processor would be replaced"),
    ],
)
def test_bad_input(tmp_path, image_parquet, monkeypatch, capsys, replaced, message):
    model = h.save_resnet(tmp_path / "model")
    (tmp_path / "file").write_text("")
    options = {"model": model, "output": tmp_path / "out", "dataset": image_parquet} | replaced
    places = {"FILE": tmp_path / "file", "MODEL": model, "OTHER": tmp_path / "other"}
    if options["output"] == "OTHER":
        h.save_resnet(tmp_path / "other")
    options["output"] = places.get(options["output"], options["output"])
    with pytest.raises(SystemExit) as stop:
        call(monkeypatch, **options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_layout_of_the_hub_is_the_default(tmp_path, image_parquet, monkeypatch, caplog):
    model = Path(h.save_vit(tmp_path / "my-student", seed=2))
    save_file(projection_head("linear", 16, 8).state_dict(), model / "head.safetensors")
    (model / "onnx").mkdir()
    (model / "onnx" / "model_int8.onnx").write_text("of an earlier export")
    with caplog.at_level("INFO"):
        call(monkeypatch, model=model, dataset=image_parquet, num_images=20, timing_rounds=1)
    assert "has a head into its teacher's space: --head exports it, too." in caplog.text
    assert {path.name for path in (model / "onnx").iterdir()} == {"model.onnx", "export.json"}
    assert json.loads((model / "onnx" / "export.json").read_text())["weights"] == weights_digest(model)
    assert exported_folders(model) == (["onnx"], [])
    h.save_vit(model, seed=3)
    assert exported_folders(model) == ([], ["onnx"])


def test_a_name_on_the_hub_needs_a_folder_to_write_to(tmp_path, image_parquet, networks, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "load_backbone", lambda name, **options: load_backbone(networks.vit, **options))
    with pytest.raises(SystemExit):
        call(monkeypatch, model="somebody/student", dataset=image_parquet)
    assert "--output is missing: --model somebody/student is a name on the Hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "package", "title"),
    [
        ("onnx", "onnxruntime", "ONNX Runtime"),
        ("openvino", "openvino", "OpenVINO"),
        ("executorch", "executorch.runtime", "ExecuTorch"),
    ],
)
def test_the_card_shows_what_was_exported(tmp_path, image_parquet, networks, monkeypatch, kind, package, title):
    """It is written at the end of the training, when there are no such files yet; its code gives the embedding."""
    pytest.importorskip(package)
    trainer = h.make_trainer(tmp_path, image_parquet, networks.teacher, networks.small, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    out = tmp_path / "out"
    before = (out / "README.md").read_text()
    assert f"### {title}" not in before
    card = renamed(before, str(out.resolve()))
    (out / "README.md").write_text(card)
    call(monkeypatch, "--head", model=out, dataset=image_parquet, num_images=12, timing_rounds=1, formats=kind)
    after = (out / "README.md").read_text()
    assert after.split("## Training")[1] == card.split("## Training")[1] and after.startswith(card.split("## Use")[0])
    section = after.split(f"### {title}")[1]
    scope = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], scope)
    expected = coss_hf.Student.from_pretrained(out).encode([scope["image"]]).numpy()
    np.testing.assert_allclose(np.asarray(scope["embedding"]), expected, rtol=1e-4, atol=1e-4)
    assert "in the teacher's space, 16 numbers" in section.split("```")[0]
    # A copy takes them along, and the code that reads them; one of other weights does not.
    student = coss_hf.Student.from_pretrained(out)
    student.save_pretrained(tmp_path / "copy")
    assert exported_folders(tmp_path / "copy") == ([kind], [])
    assert f"### {title}" in (tmp_path / "copy" / "README.md").read_text()
    next(student.model.parameters()).data += 1
    student.save_pretrained(tmp_path / "changed")
    copied = (tmp_path / "changed" / "README.md").read_text()
    assert f"### {title}" not in copied and "### Transformers" in copied
    assert exported_folders(tmp_path / "changed") == ([], [])


def test_knn_embeds_a_bounded_number_of_training_images(tmp_path, image_parquet, networks, monkeypatch, caplog):
    """All of ImageNet's training images were embedded by every format, without a word."""
    given = {}
    monkeypatch.setattr(recipe, "export", lambda student, output, **options: given.update(options))
    data = recipe.DataArguments(dataset=str(image_parquet))
    options = {"model": networks.vit, "output": str(tmp_path / "out"), "num_images": 12}
    with caplog.at_level("INFO"):
        record = recipe.run(data, recipe.ExportArguments(**options, num_train_images=20))
    assert (record["images"], record["bank"]) == (12, 20) and [len(part) for part in given["labels"]] == [20, 12]
    assert sum(len(batch) for batch in given["train_images"]) == 20
    assert "k-NN of 12 test images among 20 of 48 training images (--num_train_images)." in caplog.text
    assert recipe.run(data, recipe.ExportArguments(**options))["bank"] == 48
    assert recipe.ExportArguments().num_train_images == 10_000, "that of the recorded results"
