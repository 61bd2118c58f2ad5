"""What two processes must find out alike, since it decides what they do together."""

import contextlib
import io
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch

import tests.helpers.runs as h
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.utils.distributed import any_process, patient_group, step_group
from coss_hf.utils.errors import CheckpointError
from coss_hf.utils.process_group import Processes
from tests.helpers.processes import spawn


class UnequalEvaluator(Evaluator):
    """As of processes whose devices round differently, and of which one cannot read an image."""

    def __call__(self, student, project=None):
        rank = torch.distributed.get_rank()
        self.test_readable[rank] = rank == 0
        metrics, projected = super().__call__(student, project)
        return metrics | {"overlap10": 0.5 + rank / 10}, projected


def unequal(splits, teacher) -> Evaluator:
    return UnequalEvaluator(teacher, splits.test, splits.image_column)


class ReadableEvaluator(Evaluator):
    """As of one process that cannot read the image that the second of two cannot."""

    def __call__(self, student, project=None):
        self.test_readable[1] = False
        return super().__call__(student, project)


def readable_alone(splits, teacher) -> Evaluator:
    return ReadableEvaluator(teacher, splits.test, splits.image_column)


def paths_in(folder: Path) -> list[str]:
    return [str(folder / name) for name in ("images", "teacher", "small")]


def timeout_of(group) -> timedelta:
    return group._get_backend(torch.device("cpu")).options._timeout


class _Reached(Exception):
    """A process is where it enters the group of the run itself."""


def waits_for_first(rank: int, folder: Path, paths: list[str]) -> dict[str, bool]:
    """By call: whether this process waited for the first one, which is late, before it entered the run's own group."""
    trainer = h.make_trainer(folder, *paths, evaluator=unequal, push_to_hub=False)
    trainer.args.push_to_hub = True  # no repository is asked for
    found = {}

    def late(name: str) -> None:
        if rank == 0:
            time.sleep(1)  # at a report, or an upload
            (folder / name).touch()

    def reached(*args, **options) -> None:
        raise _Reached

    def push() -> None:
        trainer._finish_current_push()
        reached()

    calls = {"evaluate": trainer.evaluate, "train": trainer.train, "save": trainer.save_model, "push": push}
    for name, call in calls.items():
        if name == "push":
            trainer.publisher.wait = lambda: late("push")
        else:
            late(name)
        with (
            mock.patch("coss_hf.trainer.trainer.broadcast_buffers", reached),
            mock.patch.object(trainer, "_claim_output_dir", reached),
            mock.patch.object(trainer.checkpoints, "same_error_everywhere", reached),
            contextlib.suppress(_Reached),
        ):
            call()
        found[name] = (folder / name).exists()
    return found


def work(rank: int, folder: Path) -> None:
    """One of two processes: an evaluation, a dry run, and how long the others may be waited for."""
    paths = paths_in(folder)
    trainer = h.make_trainer(folder, *paths, evaluator=unequal)
    metrics = trainer.evaluate()
    found = {
        "overlap": metrics["eval_overlap10"],
        "loss": metrics["eval_loss"],
        "readable": trainer.evaluator.test_readable,
    }
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        h.make_trainer(folder, *paths, dry_run=True).train()
    found["dry run"] = out.getvalue()
    found["gathered"] = Processes().gather(rank)
    found["late"] = waits_for_first(rank, folder, paths)
    found["timeout"] = timeout_of(patient_group())
    found["timeout of a step"] = timeout_of(step_group())
    found["timeout of the run"] = timeout_of(torch.distributed.group.WORLD)
    with mock.patch("coss_hf.utils.distributed.patient_group", side_effect=AssertionError):
        found["any in a step"] = any_process(rank == 1)
    with mock.patch("coss_hf.utils.distributed.step_group", side_effect=AssertionError):
        found["any"] = any_process(rank == 1, patient=True)
        with contextlib.suppress(CheckpointError), trainer.checkpoints.same_error_everywhere(folder):
            if rank == 1:
                raise OSError
            found["same error"] = True
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(saved, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    for name in ("images", "teacher", "small"):
        (folder / name).symlink_to(saved / name)
    spawn(work, folder, folder, processes=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_metrics_that_steer_the_training_are_those_of_the_first_process(found):
    """Each had its own: one wrote the best student, or ended, while the other waited for it in the next step."""
    assert [one["overlap"] for one in found] == [0.5, 0.5]


def test_the_loss_of_held_out_images_is_that_of_images_which_all_processes_read(found, saved, tmp_path):
    assert [int((~one["readable"]).sum()) for one in found] == [1, 1] and not found[0]["readable"][1]
    alone = h.make_trainer(tmp_path, *paths_in(saved), evaluator=readable_alone, per_device_train_batch_size=16)
    expected = alone.evaluate()["eval_loss"]
    assert [one["loss"] for one in found] == pytest.approx([expected] * 2, rel=1e-4)


def test_a_dry_run_of_several_processes_ends_and_is_printed_once(found):
    """The first one waited for the others, which had ended, in the loss."""
    assert "estimate" in found[0]["dry run"] and not found[1]["dry run"]


def test_processes_wait_for_one_that_measures_or_uploads(found):
    """They gave up after half an hour."""
    assert all(one["timeout"] > timedelta(days=30) and one["any"] and one["gathered"] == [0, 1] for one in found)


def test_a_lost_machine_does_not_hang_the_others_in_what_they_agree_on_at_each_step(found):
    """They waited for it for 100 days."""
    assert all(one["any in a step"] and one["timeout of a step"] == one["timeout of the run"] for one in found)
    assert found[0]["timeout of a step"] < timedelta(hours=1)


@pytest.mark.parametrize("call", ["evaluate", "train", "save", "push"])
def test_processes_wait_for_a_report_or_an_upload_of_the_first_before_they_enter_the_group_of_the_run(found, call):
    """Its timeout of half an hour ended a run whose first process waited for pushes in the background."""
    assert all(one["late"][call] for one in found)
