"""Runs in a notebook: the output folder, losses of the user's own, what trackers and the card are told."""

import json
import random
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from coss_hf import DistillationArguments, DistillationTrainer
from coss_hf.losses import CoSSLoss
from coss_hf.losses.registry import LOSSES
from coss_hf.reporting.run_report import NOT_EVALUATED
from coss_hf.trainer.callbacks.console import ConsoleCallback
from coss_hf.trainer.distillation_model import as_output
from coss_hf.trainer.inputs import described, hub_dataset
from tests.trainer.test_front_door import arguments, data, images, trained, weights  # noqa: F401 (a fixture)


@pytest.fixture
def make(tmp_path, images, networks):  # noqa: F811
    def trainer(train_dataset=images, criterion=None, eval_dataset=None, **options):
        return DistillationTrainer(
            networks.teacher,
            networks.resnet,
            arguments(tmp_path, **options),
            train_dataset,
            eval_dataset,
            criterion=criterion,
            data=data(tmp_path),
        )

    return trainer


def checkpoints(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))


def test_a_cell_that_is_run_again_does_not_mix_two_runs(make, tmp_path):
    """The old run's newest checkpoint was kept, and resumed from, as if it were the new run's."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = trained(make(**saving))
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    again = make(learning_rate=0.02, **saving)
    with pytest.raises(ValueError, match="^output_dir=.* already holds a run: continue it with resume_from_checkpoint"):
        again.train()
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    replaced = make(learning_rate=0.02, max_steps=2, overwrite_output_dir=True, **saving)
    assert trained(replaced) != first and checkpoints(tmp_path) == ["checkpoint-2"]
    resumed = make(learning_rate=0.02, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]


def test_a_second_training_of_a_trainer_is_a_run_of_its_own(make, tmp_path):
    """Its first checkpoints were rotated away at once, and the record and the clock were those of the first."""
    trainer = make(save_strategy="steps", save_steps=1, logging_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "other"))
    trainer.save_model()
    assert (tmp_path / "other" / "run.json").read_text() == (tmp_path / "out" / "run.json").read_text()
    with pytest.raises(ValueError, match="already holds a run.*overwrite_output_dir=True"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    trainer.args.overwrite_output_dir = True
    trainer.args.max_steps = 2
    optimizer = trainer.optimizer.optimizer
    trainer.train()
    assert trainer.teacher_images == 16 and trainer.optimizer.optimizer is optimizer
    assert trainer.state.log_history[0]["learning_rate"] == trainer.args.learning_rate
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert all(line.get("images_per_second", 1) > 0 for line in trainer.state.log_history)
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["images_seen"] == 16


@pytest.mark.parametrize(
    "waiting", [{"save_strategy": "best"}, {"load_best_model_at_end": True, "save_strategy": "steps"}]
)
def test_a_best_student_needs_images_enough_for_its_metric(make, images, waiting):  # noqa: F811
    """With fewer than 11 held-out images there was no best student, without a word."""
    with pytest.raises(ValueError, match="^metric_for_best_model=overlap10 .*waits for it: hold out 11 images"):
        make(eval_dataset=images.select(range(10)), **waiting)


def test_the_loss_is_no_metric_of_fewer_images_than_processes(make, images, monkeypatch):  # noqa: F811
    """Its evaluations have no eval_loss."""
    trainer = make(eval_dataset=images.select(range(3)), metric_for_best_model="loss")
    monkeypatch.setattr(DistillationArguments, "world_size", 4)
    with pytest.raises(ValueError, match="^--metric_for_best_model=loss is not measured"):
        trainer._check_evaluations()


def test_the_loss_of_a_batch_is_no_metric_of_one_image(make, images):  # noqa: F811
    with pytest.raises(ValueError, match="^metric_for_best_model=loss is not measured"):
        make(eval_dataset=images.select(range(1)), metric_for_best_model="loss", eval_strategy="steps")


def test_a_dry_run_trains_nothing(make, tmp_path, capsys):
    """It trained, with neighbours that were made up."""
    make(dry_run=True, neighbors_k=1, neighbors_pool=4).train()
    out = capsys.readouterr().out
    assert "estimate" in out and "1 of the nearest 4" in out and not (tmp_path / "out" / "model.safetensors").exists()


def test_a_dry_run_says_in_words_what_was_resolved(make, images, capsys):  # noqa: F811
    make(dry_run=True, head="mlp", head_hidden_size=24, method="coss + rkd").train()
    out = capsys.readouterr().out
    assert re.search(r"\nhead        mlp, \d+ -> 24 -> \d+ numbers\n", out) and "x 1 process x" in out
    assert "evaluation  none during training: no images are held out (validation_size)" in out
    assert "SumLoss" not in out and "CoSSLoss(" in out and ") + RKDLoss(" in out
    make(dry_run=True, eval_dataset=images.remove_columns("label"), eval_steps=100, max_steps=2).train()
    assert "images, before the first step alone" in capsys.readouterr().out


def test_an_option_without_effect_is_named_once(make, caplog):
    """The step that is tried on noise said so, too."""
    make(method="pkt", lambda_ss=0.5)
    assert caplog.text.count("lambda_ss=0.5 has no effect") == 1


def test_a_repository_is_no_commit_message(make):
    """`trainer.push_to_hub("me/student")` pushed to another name, with this as the message of its commit."""
    with pytest.raises(ValueError, match="^commit_message='me/student' looks like a repository: .* hub_model_id"):
        make().push_to_hub("me/student")


def test_card_of_a_student_that_was_not_evaluated(make, tmp_path):
    """Its card said that it embeds images as its teacher does, and nothing of what was not measured."""
    run = make(max_steps=2)
    run.train()
    run.report()
    card = (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["evaluated_on"] is None and record["evaluated_images"] is None
    for text in (card, (tmp_path / "out" / "report.html").read_text()):
        assert NOT_EVALUATED in text
    assert f"images seen | {run.images_seen:,}, of {record['train_images']:,} training images |" in card


def test_a_dry_run_measures_the_step_that_will_be_made(tmp_path, images, saved, capsys):  # noqa: F811
    """It measured a float32 student under bf16, and kept the activations that checkpointing would not."""
    precisions = set()

    def note(module, inputs, output):
        if module.training:
            precisions.add(output.dtype)

    options = {"bf16": True, "gradient_checkpointing": True, "dry_run": True}
    trainer = DistillationTrainer(str(saved / "teacher"), str(saved / "vit"), arguments(tmp_path, **options), images)
    layers = [module for module in trainer.student.model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(note)
    trainer.train()
    assert "estimate" in capsys.readouterr().out
    assert precisions == {torch.bfloat16} and any(
        getattr(module, "gradient_checkpointing", False) for module in trainer.student.model.modules()
    )


class NotebookProgressCallback(TrainerCallback):
    """By its name, which is all that is read of it: the table of a notebook."""


@pytest.mark.parametrize("shown_by", [None, NotebookProgressCallback])
def test_a_study_prints_nothing_and_a_notebook_what_to_do_next(make, tmp_path, capsys, shown_by):
    """Each trial of a study told what to do with a student that the study removes."""
    trainer = make(view_epochs=1, teacher_cache=str(tmp_path / "cache"))
    trainer.remove_callback(ConsoleCallback)
    if shown_by is not None:
        trainer.add_callback(shown_by)
    trainer.train()
    out = capsys.readouterr().out
    for text in ("Next: trainer.save_model()", "Teacher cache"):
        assert (text in out) == (shown_by is not None), out


class OfMaps(nn.Module):
    """A loss of the user's own: of maps and of rows of the training images, which evaluation does not give."""

    def forward(self, student, teacher, index):
        assert student.maps and int(index.max()) < 48
        return (student.maps[-1].mean((1, 2, 3)) - teacher.maps[-1].mean((1, 2, 3))).square().mean()

    uses_maps = True


class OfEmbeddings(nn.Module):
    def forward(self, student, teacher, index):
        return (student.embedding - teacher.embedding).square().mean()


@pytest.mark.parametrize("loss", [OfMaps, OfEmbeddings])
def test_a_loss_of_ones_own(make, tmp_path, images, loss):  # noqa: F811
    """It was evaluated, recorded and cited as coss."""
    trainer = make(criterion=loss(), eval_dataset=images.select(range(12)), eval_strategy="steps", eval_steps=2)
    trained(trainer)
    assert not any("eval_loss" in line for line in trainer.state.log_history)
    assert any("eval_overlap10" in line for line in trainer.state.log_history)
    trainer.report()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["arguments"]["method"] == loss.__name__ == trainer.identity()["--method"]
    assert f"| method | `{loss.__name__}`, no labels |" in card and "Space Similarity" not in card


def test_a_built_in_loss_as_a_module_is_named_and_cited(make, tmp_path, images):  # noqa: F811
    trainer = make(criterion=CoSSLoss(beta=20.0), eval_dataset=images.select(range(12)))
    trained(trainer)
    trainer.create_model_card()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "beta=20.0" in card and "Space Similarity" in card and trainer.methods == ["coss"]
    assert "eval_loss" in trainer.evaluate()
    memory = make(criterion=LOSSES["crd"](student_dim=16, teacher_dim=16, num_images=48), overwrite_output_dir=True)
    assert not memory._loss_needs_embeddings_alone()


class Wrong(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, student, teacher, index):
        return self.output


class OtherCall(nn.Module):
    def forward(self, prediction, target):
        return prediction


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (Wrong(torch.zeros(2)), r"it returned a tensor of \(2,\); return a scalar tensor"),
        (Wrong({"total": torch.zeros(())}), "it returned a dictionary of 'total'"),
        (Wrong(None), "it returned a NoneType"),
        (
            Wrong({"loss": torch.zeros(()), "each": torch.zeros(2)}),
            r"its part 'each' is a tensor of \(2,\); return a sc",
        ),
        (Wrong({"loss": torch.zeros(()), "name": "a"}), "its part 'name' is a str"),
        (OtherCall(), "takes 3 positional arguments but 4 were given"),
    ],
)
def test_a_loss_that_does_not_work_is_refused_before_training(make, loss, message):
    with pytest.raises(ValueError, match=f"^criterion={type(loss).__name__} fails .*{message}"):
        make(criterion=loss)


def test_numbers_among_the_parts_of_a_loss_are_logged():
    """They failed at the first step."""
    output = as_output({"loss": torch.ones(1), "temperature": 0.07, "count": np.int64(3)})
    assert {name: value.item() for name, value in output.items()} == pytest.approx(
        {"loss": 1.0, "temperature": 0.07, "count": 3.0}
    )
    assert all(value.shape == () for value in output.values())


def test_trackers_are_told_the_end_of_a_run(make, tmp_path, images, monkeypatch):  # noqa: F811
    """Only a recipe told them: runs from Python had no results, no pictures, and no end."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "boards"))
    trainer = make(eval_dataset=images.select(range(12)), report_to=["tensorboard"])
    trained(trainer)
    trainer.report()
    board = EventAccumulator(str(next((tmp_path / "boards").rglob("events*")).parent)).Reload()
    assert "final/student/cosine" in board.Tags()["scalars"] and "pictures/loss" in board.Tags()["images"]


def test_what_is_in_memory_is_no_name_on_the_hub(make, tmp_path, images):  # noqa: F811
    """The card of the ten lines linked to a dataset named Dataset."""
    assert described(images) == "Dataset (in memory)" and hub_dataset(images) is None
    images.info.download_checksums = {"hf://datasets/ethz/food101@e06acf2a/data/train-0.parquet": {}}
    assert described(images) == described(datasets.DatasetDict(train=images)) == "ethz/food101"
    images.info.download_checksums = None
    trainer = make()
    trained(trainer)
    record = json.loads(Path(tmp_path, "out", "run.json").read_text())
    assert record["arguments"]["dataset"] == "Dataset (in memory)", "save_model leaves a record"
    trainer.create_model_card()
    assert "datasets:" not in (tmp_path / "out" / "README.md").read_text()


def test_held_out_images_of_any_split(make, images, tmp_path):  # noqa: F811
    """Splits of other names than train were refused, and a test split of the training images was measured instead."""
    both = datasets.DatasetDict(train=images, test=images.select(range(9)))
    held_out = datasets.DatasetDict(validation=images.select(range(20)), test=images.select(range(12)))
    trainer = make(both, eval_dataset=held_out)
    assert len(trainer.evaluator.test_images) == 12 and trainer.splits.test is None
    assert len(make(both, eval_dataset=images.select(range(7))).evaluator.test_images) == 7


def test_a_used_folder_is_refused_before_neighbours_are_searched(make, images, monkeypatch):  # noqa: F811
    """Neighbours of the new run had been mined, for hours perhaps, when `train` refused its folder."""
    from coss_hf.trainer import trainer as module

    options = {"neighbors_k": 1, "neighbors_pool": 4, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trained(make(**options))
    searched = []
    find = module.find_neighbors
    monkeypatch.setattr(module, "find_neighbors", lambda *given: searched.append(1) or find(*given))
    again = make(**options)
    assert again.evaluate(images.select(range(12)))["eval_cosine"], "a used folder may be evaluated"
    with pytest.raises(ValueError, match="^output_dir=.* already holds a run"):
        again.train()
    assert not searched
    longer = make(**options | {"max_steps": 4})
    longer.train(resume_from_checkpoint=True)
    assert searched == [1] and longer.train_dataset.k == 1 and longer.state.global_step == 4
    replaced = make(**options, overwrite_output_dir=True)
    replaced.train()
    assert searched == [1, 1] and replaced.train_dataset.k == 1
    make(**options, dry_run=True).train()
    assert searched == [1, 1, 1]


def test_a_used_folder_with_neighbours_is_the_run_that_it_was(make):
    """As studies resume their trials: the checkpoint was refused, "then neighbors_k 1, now 0"."""
    options = {"neighbors_k": 1, "neighbors_pool": 4, "save_strategy": "steps", "save_steps": 2}
    first = make(max_steps=2, **options)
    first.train()
    again = make(max_steps=4, **options)
    assert "--neighbors_k" not in again.identity(search=False) and again.train_dataset.k == 0
    again.train(resume_from_checkpoint=again.find_checkpoint("auto"))
    assert again.state.global_step == 4 and again.train_dataset.k == 1
    assert again.identity() == first.identity() == make(max_steps=4, **options).identity()


class OtherSignature(DistillationTrainer):
    """A trainer of the user's own."""

    def __init__(self, networks, folder, photos, **options):
        args = arguments(folder, save_strategy="steps", save_steps=2, **options)
        super().__init__(networks.teacher, networks.resnet, args, photos, data=data(folder))


def test_recorded_images_are_taken_up_by_a_subclass_of_another_signature(tmp_path, images, networks):  # noqa: F811
    """The trainer called its own `__init__` again, which was the subclass's."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for row in range(16):
        images[row]["image"].save(folder / f"{row:02d}.png")
    OtherSignature(networks, tmp_path, str(folder), max_steps=2).train()
    images[20]["image"].save(folder / "00new.png")
    again = OtherSignature(networks, tmp_path, str(folder), max_steps=4)
    assert len(again.train_dataset) == 17
    again.train(resume_from_checkpoint=True)
    assert len(again.train_dataset) == 16 and again.state.global_step == 4


def test_what_is_found_on_resuming_is_printed_once_a_run(make, tmp_path, capsys):
    """Once a process: the second resume of a notebook was silent."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    make(**saving).train()
    for steps in (6, 8):
        newest = max((tmp_path / "out").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        (newest / "trainer_state.json").write_text("{")
        capsys.readouterr()
        make(max_steps=steps, **saving).train(resume_from_checkpoint=True)
        assert capsys.readouterr().out.count("Damaged, and passed over for") == 1


def test_train_and_report_end_with_what_to_do_next(make, images, capsys):  # noqa: F811
    """Only the recipe's runs ended with a verdict, the page, and lines that use the student."""
    trainer = make(eval_dataset=images.select(range(12)))
    trainer.train()
    out = capsys.readouterr().out
    assert "shared with the teacher, on images held out: " in out and " % before the training, " in out
    assert out.rstrip().endswith("compares it with its teacher and with random weights.")
    assert out.count("Next: trainer.save_model() writes the student to ") == 1
    trainer.save_model()
    report = trainer.report()
    out = capsys.readouterr().out
    for sentence in report.record["verdict"]:
        assert out.count(sentence) == 1 and "--" not in sentence
    assert out.count("| random ") == out.count("The page of this run: ") == 1
    assert out.count('student = coss_hf.Student.from_pretrained("') == out.count("    trainer.push_to_hub()") == 1
    assert len(repr(report)) < 80, "a notebook shows what the last line of a cell returns"
    quiet = make(log_format="json", overwrite_output_dir=True)
    quiet.train()
    assert "Next: " not in capsys.readouterr().out


def test_a_dry_run_names_parameters(make, capsys):
    make(dry_run=True).train()
    out = capsys.readouterr().out
    assert "held out (validation_size)" in out and "--" not in out


def draws_from_all(image):
    """A transform of the user's own, of every global generator."""
    view = torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)
    shift = random.randrange(60) + np.random.randint(60) + int(torch.randint(60, ()))
    return (view // 4 + shift).to(torch.uint8)


def test_a_resumed_run_gets_the_same_views_of_a_transform(tmp_path, images, networks):  # noqa: F811
    """Views of `random` and NumPy were those of the process and the worker that made them."""

    def train(name: str, steps: int, **options) -> str:
        resume = options.pop("resume", None)
        given = {"save_strategy": "steps", "save_steps": 2, "num_images": 8 * steps, "max_steps": -1} | options
        args = arguments(tmp_path, name, lr_scheduler_type="constant", augmentation="imagenet", **given)
        trainer = DistillationTrainer(networks.teacher, networks.resnet, args, images, transform=draws_from_all)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        return weights(tmp_path / name)

    expected = train("whole", 4)
    train("out", 2)
    assert train("out", 4, resume=True, dataloader_num_workers=1) == expected


class Brighter:
    """A transform without a name, whose calls leave something in it."""

    def __init__(self, shift: int):
        self.shift = shift
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) // 2 + self.shift


def shifted(shift: int):
    return lambda image: torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1) // 2 + shift


@pytest.mark.parametrize("kind", [Brighter, shifted])
def test_another_transform_of_the_same_name_is_not_resumed(tmp_path, images, networks, kind):  # noqa: F811
    def make(transform) -> DistillationTrainer:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "augmentation": "imagenet"}
        args = arguments(tmp_path, **options)
        return DistillationTrainer(networks.teacher, networks.resnet, args, images, transform=transform)

    first = make(kind(0))
    first.train()
    named = first.arguments["augmentation"]  # was that of args, which made no view
    assert named == first.train_dataset.augmentation_name != "imagenet" and " at 0x" not in named
    make(kind(0)).train(resume_from_checkpoint=True)  # an object of another place in memory was refused
    make(first.train_dataset.augment).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="written with another transform"):
        make(kind(9)).train(resume_from_checkpoint=True)
