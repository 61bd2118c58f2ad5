"""Trackers of Transformers, each replaced by one that is told more."""

from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.integrations.integration_utils import TrackioCallback

from coss_hf.reporting.tensorboard_tracker import TensorBoardTracker
from coss_hf.reporting.tracked import end_of_run
from coss_hf.reporting.trackio_tracker import TrackioTracker
from coss_hf.reporting.wandb_tracker import WandbTracker
from coss_hf.utils.packages import check_extra, is_installed

TRACKERS = {WandbCallback: WandbTracker, TrackioCallback: TrackioTracker, TensorBoardCallback: TensorBoardTracker}


def check_trackers(names: list[str]) -> None:
    """Check that the packages of trackers are installed; those of others than ours, `Trainer` checks.

    Args:
        names: of ``--report_to``.

    Raises:
        MissingPackage: one is not installed.
    """
    for name in names:
        if name == "trackio" or (name == "tensorboard" and not is_installed("tensorboardX")):  # either of two will do
            check_extra(name, needed_by=f"--report_to={name}")


def use_own_trackers(trainer) -> None:
    """Replace the trackers that ``--report_to`` has given to a ``DistillationTrainer``."""
    for default, own in TRACKERS.items():
        if trainer.pop_callback(default) is not None:
            trainer.add_callback(own(trainer))


def _own_trackers(trainer) -> list:
    return [found for found in trainer.callback_handler.callbacks if isinstance(found, tuple(TRACKERS.values()))]


def end_trackers(trainer) -> None:
    """End the runs of a trainer's trackers, where no report does: another training follows in the same process."""
    for tracker in _own_trackers(trainer):
        tracker.end()


def report_end_of_run(trainer, report) -> None:
    """Hand the end of a run to its trackers; on the first process alone.

    Args:
        trainer: a ``DistillationTrainer``.
        report: its ``RunReport``.
    """
    trackers = _own_trackers(trainer)
    if not trackers or not trainer.is_world_process_zero():
        return
    end = end_of_run(trainer, report)
    for tracker in trackers:
        tracker.report(end)
