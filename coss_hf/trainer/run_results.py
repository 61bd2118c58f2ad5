"""What a training came to: teacher, student and random weights compared, and the record, pictures, page and card."""

from typing import NamedTuple

from coss_hf.evaluation import evaluator as evaluation
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.reporting.run_report import NeighborExamples, write_page, write_pictures, write_record
from coss_hf.trainer.inputs import build_evaluator


class RunReport(NamedTuple):
    """What a run came to.

    Attributes:
        record: what ``run.json`` holds.
        neighbors: images with their nearest neighbours in both spaces; None without held-out images.
        projection: both spaces in the plane; see ``write_pictures``.
    """

    record: dict
    neighbors: NeighborExamples | None
    projection: dict | None


def compare(trainer) -> dict[str, dict]:
    """See ``DistillationTrainer.compare``."""
    return _compared(trainer, _final_evaluator(trainer))


def report(trainer) -> RunReport:
    """See ``DistillationTrainer.report``."""
    args = trainer.args
    final = _final_evaluator(trainer)
    results = _compared(trainer, final)
    with trainer.checkpoints.disk_full_as_checkpoint_error(student_saved=True):
        record = write_record(args.output_dir, trainer, results, trainer.splits)
        neighbors, projection = write_pictures(args.output_dir, trainer, final)
        write_page(args.output_dir, trainer, record)
        trainer.create_model_card(record=record)
    return RunReport(record, neighbors, projection)


def _final_evaluator(trainer) -> Evaluator | None:
    """Of test images, which are read once, else of the images held out of train."""
    splits = trainer.splits
    if splits is None:
        raise ValueError("compare and report need the images themselves: give train_dataset a dataset, not views.")
    return build_evaluator(splits, trainer.teacher, trainer.args, splits.test or splits.validation)


def _compared(trainer, final: Evaluator | None) -> dict[str, dict]:
    if final is None:
        return {}
    return evaluation.compare(final, trainer.student, trainer.project, seed=trainer.args.seed)
