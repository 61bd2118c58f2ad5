import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, BertConfig, BertModel

import tests.helpers.runs as h
from coss_hf.data.loading import load_images
from coss_hf.models.loading import load_backbone
from coss_hf.neighbors.mining import add_neighbors
from coss_hf.trainer.inputs import build_evaluator
from tests.helpers.processes import run as run_program

ROOT = Path(__file__).resolve().parents[2]


def load_recipe(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


distill = load_recipe("distill")


@pytest.fixture
def world(tmp_path, image_parquet, monkeypatch):
    """A teacher, a student, images, and a way to call the recipe on them."""
    w = SimpleNamespace(
        teacher=h.save_resnet(tmp_path / "teacher", seed=1),
        student=h.save_resnet(tmp_path / "student", seed=2, hidden_sizes=(4, 4, 8)),
        images=str(image_parquet),
        out=tmp_path / "out",
    )

    def run(*argv, **replaced):
        options = {
            "teacher": w.teacher,
            "student": w.student,
            "dataset": w.images,
            "output_dir": str(w.out),
            "settings": "paper",
            "per_device_train_batch_size": 8,
            "augmentation": "cifar",
            "num_images": 48,
            "neighbors_cache": str(tmp_path / "neighbours"),
            "disable_tqdm": True,
            "use_cpu": True,
            **replaced,
        }
        words = [f"--{key}={value}" for key, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["distill.py", *words, *argv])
        distill.main()

    w.run = run
    return w


def test_every_stage(world, capsys):
    world.run(neighbors_k=2, neighbors_pool=5, validation_size=12, eval_strategy="epoch", logging_steps=1)
    out = capsys.readouterr().out
    assert "pooling pooler" in out and "| student |" in out
    record = json.loads((world.out / "run.json").read_text())
    assert record["images_seen"] == 48 and record["arguments"]["neighbors_k"] == 2
    assert set(record["results"]) == {"teacher", "student", "random"}
    for name, row in record["results"].items():
        assert row["parameters"] > 0 and 0 <= row["knn10"] <= 1 and 0 <= row["probe"] <= 1, name
    assert record["results"]["teacher"]["overlap10"] == 1
    for picture in ("loss.png", "neighbors.png", "panel.png", "projection.png"):
        assert Image.open(world.out / picture).size[0] > 300
    page = (world.out / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "random weights" in page and "neighbors_k: 2" in page
    # The folder is the complete student, for anybody.
    images, _ = h.colour_images(3, seed=5)
    model = AutoModel.from_pretrained(world.out).eval()
    with torch.no_grad():
        found = model(**AutoImageProcessor.from_pretrained(world.out)(images, return_tensors="pt")).pooler_output
        student = load_backbone(str(world.out))
        student.model.eval()
        expected = student.features(student.preprocess(images)).embedding
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_a_run_is_not_written_over(world, capsys):
    world.run()
    before = (world.out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        world.run()
    assert stop.value.code == 2 and "--overwrite_output_dir" in capsys.readouterr().err
    assert (world.out / "model.safetensors").read_bytes() == before
    world.run("--overwrite_output_dir", seed=7)
    assert (world.out / "model.safetensors").read_bytes() != before


def test_invalid_output_folder_is_rejected(world, capsys):
    world.out.write_text("a file")
    with pytest.raises(SystemExit) as stop:
        world.run(output_dir=world.out / "inside")
    assert stop.value.code == 2 and "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("leaves", [False, True])
def test_one_run_at_a_time_in_a_folder(world, capsys, monkeypatch, leaves):
    monkeypatch.setattr("coss_hf.trainer.checkpoint_files.PATIENCE", 20 if leaves else 0.2)
    world.out.mkdir()
    program = "import filelock, sys; l = filelock.FileLock(sys.argv[1]); l.acquire(); print('held', flush=1); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", program, world.out / "_lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    if leaves:
        Timer(1.0, other.kill).start()
        world.run()
        assert (world.out / "model.safetensors").exists()
    else:
        with pytest.raises(SystemExit) as exit:
            world.run()
        assert exit.value.code == 2 and "another run is at work there; stop it" in capsys.readouterr().err
        assert [path.name for path in world.out.iterdir()] == ["_lock"]
    other.kill()
    other.communicate()


def test_a_disk_that_is_full_when_the_report_is_written(world, capsys, monkeypatch):
    def full(folder, *_):
        raise OSError(28, "No space left on device", f"{folder}/report.html")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("coss_hf.trainer.run_results.write_page", full)
        world.run("--save_strategy=steps", "--save_steps=6")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "report.html could not be written: [Errno 28]" in error
    assert "checkpoint-6 is complete" in error and "same command with --resume_from_checkpoint" in error
    world.run("--save_strategy=steps", "--save_steps=6", "--resume_from_checkpoint")
    assert (world.out / "report.html").is_file() and "step 6." in capsys.readouterr().out


def test_a_full_disk_without_checkpoints_does_not_advise_to_resume(world, capsys, monkeypatch):
    """There is nothing to resume from, and the student is whole: starting afresh would throw it away."""

    def full(folder, *_, **options):
        raise OSError(28, "No space left on device", f"{folder}/run.json")

    monkeypatch.setattr("coss_hf.trainer.run_results.write_record", full)
    with pytest.raises(SystemExit) as stop:
        world.run(save_strategy="no", validation_size=0)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and f"The trained student is saved in {world.out}; free some space" in error
    assert "--resume" not in error and "--overwrite" not in error


def test_resuming_nothing_does_not_replace_a_student(world, capsys):
    world.run(save_strategy="no")
    before = (world.out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        world.run("--resume_from_checkpoint", seed=7)
    assert "no complete checkpoint" in capsys.readouterr().err
    assert (world.out / "model.safetensors").read_bytes() == before


def test_the_record_keeps_no_secret(world):
    world.run("--hub_token", "SECRET", save_strategy="no")
    assert "SECRET" not in (world.out / "run.json").read_text()


def test_the_bank_during_training_is_drawn_from_all_classes(world):
    splits = load_images(world.images, validation_size=4)
    by_class = splits._replace(train=splits.train.sort("label"))
    args = SimpleNamespace(per_device_eval_batch_size=4, dataloader_num_workers=0, eval_bank_size=16)
    chosen = build_evaluator(by_class, None, args, splits.validation, during_training=True).train_images
    assert len(chosen) == 16 and len(set(chosen["label"])) > 2


def test_dry_run_resolves_everything_and_writes_nothing(world, capsys):
    world.run("--dry_run", neighbors_k=2, neighbors_pool=5)
    out = capsys.readouterr().out
    for word in ("teacher ", "student ", "head ", "Linear", "neighbours  2 of the nearest 5", "2 steps", "estimate"):
        assert word in out, word
    assert "evaluation  no: without images held out" in out
    world.run("--dry_run", validation_size=8)
    assert "evaluation  on 8 images held out of train, before the first step and every" in capsys.readouterr().out
    assert not world.out.exists() or not any(world.out.iterdir())


def test_dry_run_estimate_leaves_the_weights_alone(world, monkeypatch):
    kept = {}

    def spy(trainer, splits, measure):
        before = h.state(trainer)
        text = describe(trainer, splits, measure)
        kept["same"] = all(torch.equal(before[n], t) for n, t in h.state(trainer).items())
        return text

    describe = distill.describe
    monkeypatch.setattr(distill, "describe", spy)
    world.run("--dry_run")
    assert kept["same"]


def test_neighbours_that_came_with_the_dataset(world, tmp_path):
    rows = load_images(world.images).train
    add_neighbors(rows, load_backbone(world.teacher), "image", k=6, cache_dir=tmp_path / "c").save_to_disk(
        tmp_path / "d"
    )
    world.run(dataset=str(tmp_path / "d"), neighbors_k=2, neighbors_pool=6)
    assert not (tmp_path / "neighbours").exists(), "nothing had to be computed"


# ---- bad input: exit code 2, one paragraph, before any training ----


def text_model(world, tmp_path):
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    BertModel(tiny).save_pretrained(tmp_path / "bert")
    return {"teacher": str(tmp_path / "bert")}


def no_image_column(world, tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).save_to_disk(tmp_path / "words")
    return {"dataset": str(tmp_path / "words")}


def empty_split(world, tmp_path):
    load_images(world.images).train.select([]).remove_columns("image_hash").save_to_disk(tmp_path / "empty")
    return {"dataset": str(tmp_path / "empty")}


def stale_neighbours(world, tmp_path):
    rows = load_images(world.images).train
    rows = add_neighbors(rows, load_backbone(world.teacher), "image", k=6, cache_dir=tmp_path / "c")
    rows.shuffle(seed=0).save_to_disk(tmp_path / "stale")
    return {"dataset": str(tmp_path / "stale"), "neighbors_k": 2, "neighbors_pool": 6}


BAD = {
    "unknown dataset": (lambda w, t: {"dataset": w.images + "s"}, ["--dataset", "images"]),
    "unknown model": (lambda w, t: {"teacher": w.teacher + "2"}, ["--teacher", "Did you mean", "/teacher"]),
    "unknown network": (lambda w, t: {"student": "resnet21", "student_init": "random"}, ["--student", "resnet20"]),
    "no image column": (no_image_column, ["--image_column", "text"]),
    "empty split": (empty_split, ["train", "empty"]),
    "fewer images than a batch": (lambda w, t: {"per_device_train_batch_size": 64}, ["=64", "48 images"]),
    "K as large as the images": (lambda w, t: {"neighbors_k": 2, "neighbors_pool": 48}, ["--neighbors_pool", "47"]),
    "stale neighbours": (stale_neighbours, ["shuffled"]),
    "batch of one": (lambda w, t: {"per_device_train_batch_size": 1}, ["batch of one image"]),
    "text model": (text_model, ["--teacher", "BertModel", "images"]),
    "no head for other dimensions": (lambda w, t: {"head": "none"}, ["--head", "8", "16"]),
    "evaluation without images": (lambda w, t: {"eval_strategy": "epoch"}, ["--validation_size"]),
    "no such checkpoint": (lambda w, t: {"resume_from_checkpoint": str(t / "nowhere")}, ["--resume_from_checkpoint"]),
    "views of no size": (lambda w, t: {"view_size": 0}, ["--view_size"]),
    "too few images": (lambda w, t: {"num_images": 3}, ["--num_images=3"]),
    "no teacher": (lambda w, t: {"teacher": None}, ["--teacher is missing"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(world, tmp_path, capsys, case):
    change, words = BAD[case]
    with pytest.raises(SystemExit) as stop:
        world.run(**change(world, tmp_path))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1
    for word in words:
        assert word in error[0], error[0]
    assert not (world.out / "model.safetensors").exists()


def test_bad_input_from_the_shell(tmp_path):
    done = run_program([ROOT / "recipes/distill.py", "--teacher", "x", "--learning_rate", "fast", "--use_cpu"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --learning_rate")
