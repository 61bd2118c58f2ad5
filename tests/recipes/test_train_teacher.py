import itertools
import json
import sys

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

import tests.helpers.runs as h
from coss_hf.cli.pages import load_recipe
from coss_hf.trainer import supervised
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.supervised import SupervisedTrainer, TeacherArguments, build_supervised_run

train_teacher = load_recipe("train_teacher")


@pytest.fixture
def train(tmp_path, image_parquet, monkeypatch):
    """Calls the recipe on the tiny images; its folder."""

    def run(*argv, **replaced):
        options = {
            "model": "resnet20",
            "image_size": 16,
            "dataset": str(image_parquet),
            "output_dir": str(tmp_path / "teacher"),
            "num_train_epochs": 12,
            "per_device_train_batch_size": 16,
            "logging_steps": 6,
            "disable_tqdm": True,
            "use_cpu": True,
            **replaced,
        }
        words = [f"--{key}={value}" for key, value in options.items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["train_teacher.py", *words, *argv])
        train_teacher.main()
        return tmp_path / "teacher"

    return run


def losses(output: str) -> list[float]:
    return [float(line.split(" loss ")[1].split()[0]) for line in output.splitlines() if " loss " in line]


def test_a_checkpoint_that_is_not_there_is_refused(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(f"--resume_from_checkpoint={tmp_path / 'nowhere'}")
    assert "nowhere is not a complete checkpoint" in capsys.readouterr().err


def test_no_file_holds_the_token(train):
    """`Trainer` writes its arguments, and would push the file."""
    folder = train("--hub_token=hf_abcdefghijklmnop", num_train_epochs=1)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert "training_args.bin" in [path.name for path in files]
    assert not any(b"hf_abcdefghijklmnop" in path.read_bytes() for path in files)


def test_checkpoints_are_complete_or_not_there(train, tmp_path, capsys, monkeypatch):
    """They were written in place, and a run of another seed went on from them."""
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4, "logging_steps": 50}
    write = SupervisedTrainer._save_rng_state

    def killed(trainer, folder):
        write(trainer, folder)
        if trainer.state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(SupervisedTrainer, "_save_rng_state", killed)
    with pytest.raises(KeyboardInterrupt):
        train(**options)
    folder = tmp_path / "teacher"
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == ["checkpoint-2", "unfinished-checkpoint-4"]
    monkeypatch.setattr(SupervisedTrainer, "_save_rng_state", write)
    with pytest.raises(SystemExit):
        train(**options)
    assert "holds checkpoints: continue the run with --resume_from_checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("--resume_from_checkpoint", "--seed=7", **options)
    assert "was written with another --seed (then 42, now 7)" in capsys.readouterr().err
    for name, then, now in (("learning_rate", "0.05", "0.5"), ("momentum", "0.9", "0.5"), ("data_seed", "42", "7")):
        with pytest.raises(SystemExit):
            train("--resume_from_checkpoint", f"--{name}={now}", **options)
        assert f"was written with another --{name} (then {then}, now {now})" in capsys.readouterr().err
    train("--resume_from_checkpoint", **options)
    assert not list(folder.glob("unfinished-*")) and (folder / "checkpoint-12").is_dir()
    resumed = load_file(folder / "model.safetensors")
    train("--overwrite_output_dir", **options)
    h.assert_same(resumed, load_file(folder / "model.safetensors"))
    # Another, shorter run: a later checkpoint of the replaced one would be resumed from.
    train("--overwrite_output_dir", "--save_only_model", **(options | {"num_train_epochs": 1}))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    (folder / "model.safetensors").unlink()
    with pytest.raises(SystemExit):
        train("--resume_from_checkpoint", **options)
    assert "holds the network without the state of its training" in capsys.readouterr().err


@pytest.fixture
def hours(monkeypatch):
    """Each look at the clock is an hour after the one before."""
    looks = itertools.count()
    monkeypatch.setattr(supervised, "monotonic", lambda: 3600.0 * next(looks))


STEPS = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 4}  # 12 steps


def interrupt_after(steps, train, monkeypatch, *argv):
    step = SupervisedTrainer.training_step

    def stopped(trainer, *args):
        if trainer.state.global_step == steps:
            raise KeyboardInterrupt
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SupervisedTrainer, "training_step", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(*argv, **STEPS)


@pytest.mark.usefixtures("hours")
def test_a_resumed_training_records_the_hours_of_all_parts(train, monkeypatch):
    """Looks at the clock: at the start, at checkpoints 2 and 4; at the start, at 6, 8, 10 and 12, at the end."""
    interrupt_after(4, train, monkeypatch)
    record = json.loads((train("--resume_from_checkpoint", **STEPS) / "run.json").read_text())
    assert record["hours"] == 2 + 5
    uninterrupted = json.loads((train("--overwrite_output_dir", **STEPS) / "run.json").read_text())
    assert uninterrupted["hours"] == 7


def test_learns_and_reloads(train, capsys):
    folder = train("--mean", "0.4", "0.5", "0.6", "--std", "0.2", "0.2", "0.2")
    out = capsys.readouterr().out
    assert losses(out)[-1] < 0.7 * losses(out)[0]
    record = json.loads((folder / "run.json").read_text())
    assert record["accuracy"] > 0.8 and f"accuracy on 24 test images: {100 * record['accuracy']:.1f} %" in out
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6] and processor.size["height"] == 16
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue", 3: "grey"}
    images, labels = h.colour_images(24, seed=1)  # what test.parquet holds
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        right = (model(pixel_values=pixels).logits.argmax(1) == torch.tensor(labels)).double().mean().item()
        assert right == record["accuracy"]
        assert AutoModel.from_pretrained(folder).eval()(pixel_values=pixels).pooler_output.shape == (24, 64, 1, 1)


def test_accuracy_is_that_of_the_saved_weights(train, monkeypatch):
    measured = {}
    accuracy = supervised.accuracy

    def spy(model, *args):
        measured.update(model.state_dict())
        return accuracy(model, *args)

    monkeypatch.setattr(supervised, "accuracy", spy)
    folder = train("--save_dtype=float16", num_train_epochs=6)
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(value.to(measured[name].dtype), measured[name]), name
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float16, torch.int64}
    record = json.loads((folder / "run.json").read_text())
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    images, labels = h.colour_images(24, seed=1)  # what test.parquet holds
    pixels = AutoImageProcessor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        right = model(pixel_values=pixels).logits.argmax(1) == torch.tensor(labels)
    assert right.double().mean().item() == record["accuracy"] and record["hours"] >= 0
    assert record["images_seen"] == 6 * 48


def test_a_checkpoint_gets_a_new_classifier(train, tmp_path, image_parquet):
    vit = h.save_vit(tmp_path / "vit")
    rows = datasets.load_dataset(str(image_parquet), cache_dir=str(tmp_path / "cache"))
    rows = rows.cast_column("label", datasets.Value("int64")).map(lambda row: {"label": row["label"] + 2})
    rows.save_to_disk(tmp_path / "six")
    folder = train(model=vit, image_size=None, dataset=tmp_path / "six", num_train_epochs=1)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.classifier.out_features == 6 and model.config.id2label[5] == "5"
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.4] * 3


def make(tmp_path, image_parquet, **options):
    options = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "model": "resnet20", "image_size": 16, **options}
    args = TeacherArguments(**{"per_device_train_batch_size": 16} | options)
    return build_supervised_run(DataArguments(dataset=str(image_parquet)), args).trainer


def test_the_papers_optimiser_and_steps(tmp_path, image_parquet):
    trainer = make(tmp_path, image_parquet, num_train_epochs=4, lr_milestones=[1, 3])
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.05, 0.9, 5e-4)
    assert len(group["params"]) == len(list(trainer.model.parameters()))
    rates = []
    for _ in range(12):  # 48 images: 3 steps per epoch
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0.05] * 3 + [0.005] * 6 + [0.0005] * 3)


@pytest.mark.parametrize("batch, drop_last, steps", [(16, True, 2), (20, True, 1), (20, False, 2)])
def test_milestones_count_epochs_of_accumulated_steps(tmp_path, image_parquet, batch, drop_last, steps):
    """48 images are 3 batches of 16, and 2 steps of at most 2 batches; 48 // 32 is 1."""
    options = {"gradient_accumulation_steps": 2, "dataloader_drop_last": drop_last}
    options["per_device_train_batch_size"] = batch
    trainer = make(tmp_path, image_parquet, num_train_epochs=4, lr_milestones=[1, 3], **options)
    assert sorted(trainer.lr_scheduler.milestones) == [steps, 3 * steps]


def test_images_seen_are_those_of_the_batches_that_were_accumulated(train):
    """Of 3 batches, the second step of an epoch has one: the images were counted as if it had two."""
    folder = train("--gradient_accumulation_steps=2", num_train_epochs=2)
    assert json.loads((folder / "run.json").read_text())["images_seen"] == 2 * 48


def test_accumulated_gradient_is_the_mean(tmp_path, image_parquet):
    trainer = make(tmp_path, image_parquet, max_steps=1, gradient_accumulation_steps=3)
    assert not trainer.model_accepts_loss_kwargs


def test_views_are_normalised_and_labelled(tmp_path, image_parquet):
    trainer = make(tmp_path, image_parquet, augmentation="none", mean=[0.5] * 3, std=[0.5] * 3)
    views, batch = trainer.train_dataset, trainer.data_collator([trainer.train_dataset[i] for i in (5, 2)])
    assert batch["labels"].tolist() == [h.colour_images(48, 0)[1][i] for i in (5, 2)]
    expected = torch.stack([views.view(i, 0)[0] for i in (5, 2)]) / 127.5 - 1
    assert torch.allclose(batch["pixel_values"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "replaced, message",
    [
        ({"model": None}, "--model is missing"),
        ({"model": "resnet21"}, "--model resnet21"),
        ({"mean": "0.5"}, "--mean"),
        ({"image_size": 0}, "image_size=0"),
        ({"per_device_train_batch_size": 64}, "--per_device_train_batch_size"),
        ({"lr_milestones": 90}, "--lr_milestones"),
        ({"lr_milestones": 0.5, "warmup_steps": 2}, "--warmup_steps=2: --lr_milestones has no warm-up"),
        ({"dataset": "unlabelled"}, "--label_column"),
    ],
)
def test_bad_input(train, tmp_path, image_parquet, capsys, replaced, message):
    if replaced.get("dataset"):
        rows = datasets.load_dataset(str(image_parquet), cache_dir=str(tmp_path / "cache")).remove_columns("label")
        rows.save_to_disk(tmp_path / "unlabelled")
        replaced = {"dataset": tmp_path / "unlabelled"}
    with pytest.raises(SystemExit) as stop:
        train(**replaced)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error.splitlines()[-1]
    assert not (tmp_path / "teacher").exists()


def test_processes_that_would_train_alone_are_refused(tmp_path, monkeypatch):
    args = TeacherArguments(output_dir=str(tmp_path / "out"), use_cpu=True, model="resnet20")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each would train alone.*--use_cpu"):
        build_supervised_run(DataArguments(), args)


def test_a_network_is_not_overwritten(train, capsys):
    train(num_train_epochs=1)
    with pytest.raises(SystemExit):
        train(num_train_epochs=1)
    assert "--overwrite_output_dir" in capsys.readouterr().err
