"""Runs in a notebook: the output folder, losses of the user's own, what trackers and the card are told."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from torch import nn

from coss_hf import DistillationTrainer
from coss_hf.losses import CoSSLoss
from coss_hf.losses.registry import LOSSES
from coss_hf.trainer.inputs import described, hub_dataset
from tests.trainer.test_front_door import arguments, data, images, trained  # noqa: F401 (a fixture)


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


def test_a_dry_run_trains_nothing(make, tmp_path, capsys):
    """It trained, with neighbours that were made up."""
    make(dry_run=True, neighbors_k=1, neighbors_pool=4).train()
    out = capsys.readouterr().out
    assert "estimate" in out and "1 of the nearest 4" in out and not (tmp_path / "out" / "model.safetensors").exists()


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
        (OtherCall(), "takes 3 positional arguments but 4 were given"),
    ],
)
def test_a_loss_that_does_not_work_is_refused_before_training(make, loss, message):
    with pytest.raises(ValueError, match=f"^criterion={type(loss).__name__} fails .*{message}"):
        make(criterion=loss)


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
