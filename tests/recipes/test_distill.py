import json
import subprocess
import sys
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


def test_every_stage(distill_command, capsys):
    distill_command.run(neighbors_k=2, neighbors_pool=5, validation_size=12, eval_strategy="epoch", logging_steps=1)
    out = capsys.readouterr().out
    assert "pooling pooler" in out and "| student |" in out
    record = json.loads((distill_command.out / "run.json").read_text())
    assert record["images_seen"] == 48 and record["arguments"]["neighbors_k"] == 2
    assert set(record["results"]) == {"teacher", "student", "random"}
    for name, row in record["results"].items():
        assert row["parameters"] > 0 and 0 <= row["knn10"] <= 1 and 0 <= row["probe"] <= 1, name
    assert record["results"]["teacher"]["overlap10"] == 1
    for picture in ("loss.png", "neighbors.png", "panel.png", "projection.png"):
        assert Image.open(distill_command.out / picture).size[0] > 300
    page = (distill_command.out / "report.html").read_text()
    assert page.count("data:image/png") == 4 and "random weights" in page and "neighbors_k: 2" in page
    # The folder is the complete student, for anybody.
    images, _ = h.colour_images(3, seed=5)
    model = AutoModel.from_pretrained(distill_command.out).eval()
    with torch.no_grad():
        found = model(
            **AutoImageProcessor.from_pretrained(distill_command.out)(images, return_tensors="pt")
        ).pooler_output
        student = load_backbone(str(distill_command.out))
        student.model.eval()
        expected = student.features(student.preprocess(images)).embedding
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-5, atol=1e-5)


def test_a_run_is_not_written_over(distill_command, capsys):
    distill_command.run()
    before = (distill_command.out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit) as stop:
        distill_command.run()
    assert stop.value.code == 2 and "--overwrite_output_dir" in capsys.readouterr().err
    assert (distill_command.out / "model.safetensors").read_bytes() == before
    distill_command.run("--overwrite_output_dir", seed=7)
    assert (distill_command.out / "model.safetensors").read_bytes() != before


def test_invalid_output_folder_is_rejected(distill_command, capsys):
    distill_command.out.write_text("a file")
    with pytest.raises(SystemExit) as stop:
        distill_command.run(output_dir=distill_command.out / "inside")
    assert stop.value.code == 2 and "cannot be made" in capsys.readouterr().err


@pytest.mark.parametrize("leaves", [False, True])
def test_one_run_at_a_time_in_a_folder(distill_command, capsys, monkeypatch, leaves):
    monkeypatch.setattr("coss_hf.trainer.checkpoint_files.PATIENCE", 20 if leaves else 0.2)
    distill_command.out.mkdir()
    program = "import filelock, sys; l = filelock.FileLock(sys.argv[1]); l.acquire(); print('held', flush=1); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", program, distill_command.out / "_lock"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    if leaves:
        Timer(1.0, other.kill).start()
        distill_command.run()
        assert (distill_command.out / "model.safetensors").exists()
    else:
        with pytest.raises(SystemExit) as exit:
            distill_command.run()
        assert exit.value.code == 2 and "another run is at work there; stop it" in capsys.readouterr().err
        assert [path.name for path in distill_command.out.iterdir()] == ["_lock"]
    other.kill()
    other.communicate()


def test_a_disk_that_is_full_when_the_report_is_written(distill_command, capsys, monkeypatch):
    def full(folder, *_):
        raise OSError(28, "No space left on device", f"{folder}/report.html")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr("coss_hf.trainer.run_results.write_page", full)
        distill_command.run("--save_strategy=steps", "--save_steps=6")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "report.html could not be written: [Errno 28]" in error
    assert "checkpoint-6 is complete" in error and "same command with --resume_from_checkpoint" in error
    distill_command.run("--save_strategy=steps", "--save_steps=6", "--resume_from_checkpoint")
    assert (distill_command.out / "report.html").is_file() and "step 6." in capsys.readouterr().out


def test_a_full_disk_without_checkpoints_does_not_advise_to_resume(distill_command, capsys, monkeypatch):
    """There is nothing to resume from, and the student is whole: starting afresh would throw it away."""

    def full(folder, *_, **options):
        raise OSError(28, "No space left on device", f"{folder}/run.json")

    monkeypatch.setattr("coss_hf.trainer.run_results.write_record", full)
    with pytest.raises(SystemExit) as stop:
        distill_command.run(save_strategy="no", validation_size=0)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and f"The trained student is saved in {distill_command.out}; free some space" in error
    assert "--resume" not in error and "--overwrite" not in error


def test_resuming_nothing_does_not_replace_a_student(distill_command, capsys):
    distill_command.run(save_strategy="no")
    before = (distill_command.out / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        distill_command.run("--resume_from_checkpoint", seed=7)
    assert "no complete checkpoint" in capsys.readouterr().err
    assert (distill_command.out / "model.safetensors").read_bytes() == before


def test_the_record_keeps_no_secret(distill_command):
    distill_command.run("--hub_token", "SECRET", save_strategy="no")
    assert "SECRET" not in (distill_command.out / "run.json").read_text()


def test_the_bank_during_training_is_drawn_from_all_classes(distill_command):
    splits = load_images(distill_command.images, validation_size=4)
    by_class = splits._replace(train=splits.train.sort("label"))
    args = SimpleNamespace(per_device_eval_batch_size=4, dataloader_num_workers=0, eval_train_size=16)
    chosen = build_evaluator(by_class, None, args, splits.validation, during_training=True).train_images
    assert len(chosen) == 16 and len(set(chosen["label"])) > 2


def test_dry_run_resolves_everything_and_writes_nothing(distill_command, capsys):
    distill_command.run("--dry_run", neighbors_k=2, neighbors_pool=5)
    out = capsys.readouterr().out
    for word in ("teacher ", "student ", "head ", "mlp, ", "neighbours  2 of the nearest 5", "2 steps", "estimate"):
        assert word in out, word
    assert "evaluation  none during training: no images are held out (--validation_size)" in out
    distill_command.run("--dry_run", validation_size=8)
    assert "evaluation  on 8 images, before the first step alone" in capsys.readouterr().out
    assert not distill_command.out.exists() or not any(distill_command.out.iterdir())


def test_dry_run_estimate_leaves_the_weights_alone(distill_command, monkeypatch):
    kept = {}

    def spy(trainer, measure):
        before = h.state(trainer)
        text = describe(trainer, measure)
        kept["same"] = all(torch.equal(before[n], t) for n, t in h.state(trainer).items())
        return text

    describe = distill_command.recipe.describe
    monkeypatch.setattr(distill_command.recipe, "describe", spy)
    distill_command.run("--dry_run")
    assert kept["same"]


def test_neighbours_that_came_with_the_dataset(distill_command, tmp_path):
    rows = load_images(distill_command.images).train
    add_neighbors(rows, load_backbone(distill_command.teacher), "image", k=6, cache_dir=tmp_path / "c").save_to_disk(
        tmp_path / "d"
    )
    distill_command.run(dataset=str(tmp_path / "d"), neighbors_k=2, neighbors_pool=6)
    assert not (tmp_path / "neighbours").exists(), "nothing had to be computed"


# ---- bad input: exit code 2, one paragraph, before any training ----


def text_model(distill_command, tmp_path):
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20)
    BertModel(tiny).save_pretrained(tmp_path / "bert")
    return {"teacher": str(tmp_path / "bert")}


def no_image_column(distill_command, tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"], "n": [1, 2]}).save_to_disk(tmp_path / "words")
    return {"dataset": str(tmp_path / "words")}


def empty_split(distill_command, tmp_path):
    load_images(distill_command.images).train.select([]).remove_columns("image_hash").save_to_disk(tmp_path / "empty")
    return {"dataset": str(tmp_path / "empty")}


def stale_neighbours(distill_command, tmp_path):
    rows = load_images(distill_command.images).train
    rows = add_neighbors(rows, load_backbone(distill_command.teacher), "image", k=6, cache_dir=tmp_path / "c")
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
def test_bad_input(distill_command, tmp_path, capsys, case):
    change, words = BAD[case]
    with pytest.raises(SystemExit) as stop:
        distill_command.run(**change(distill_command, tmp_path))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(error) == 1
    for word in words:
        assert word in error[0], error[0]
    assert not (distill_command.out / "model.safetensors").exists()


def test_bad_input_from_the_shell(tmp_path):
    done = run_program([h.ROOT / "recipes/distill.py", "--teacher", "x", "--learning_rate", "fast", "--use_cpu"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: --learning_rate")
