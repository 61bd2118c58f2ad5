"""What a training came to: teacher, student and random weights compared, and the record, pictures, page and card."""

from collections.abc import Callable
from typing import NamedTuple

from coss_hf.evaluation import evaluator as evaluation
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.reporting.run_report import NeighborExamples, write_page, write_pictures, write_record
from coss_hf.trainer.inputs import build_evaluator
from coss_hf.utils.disk import full_disk
from coss_hf.utils.messages import command_to, first_line, get_logger

logger = get_logger(__name__)


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

    def __repr__(self) -> str:
        """Short: a notebook prints what the last line of a cell returns."""
        return f"RunReport of {self.record.get('images_seen', 0):,} images seen"


def compare(trainer) -> dict[str, dict]:
    """See ``DistillationTrainer.compare``."""
    return _compared(trainer, _final_evaluator(trainer))


def report(trainer) -> RunReport | None:
    """See ``DistillationTrainer.report``."""
    if not trainer.is_world_process_zero():
        return None
    folder = trainer.args.output_dir
    splits = _splits(trainer)

    def measured() -> tuple[Evaluator | None, dict[str, dict]]:
        final = _final_evaluator(trainer)
        return final, _compared(trainer, final)

    with trainer.checkpoints.disk_full_as_checkpoint_error(student_saved=True):
        # First without results: a process that is killed while it measures leaves these at least.
        unfinished = f"The final evaluation did not come to an end: measure the student with {command_to('evaluate')}."
        write_page(folder, trainer, write_record(folder, trainer, {}, splits, problems=[unfinished]))
        (final, results), problem = _unless_it_fails("evaluation", measured, (None, {}))
        problems = [problem] if problem else []
        pictures = (None, None)
        if not problem:
            pictures, problem = _unless_it_fails(
                "pictures", lambda: write_pictures(folder, trainer, final), (None, None)
            )
            problems += [problem] if problem else []
        record = write_record(folder, trainer, results, splits, problems=problems)
        write_page(folder, trainer, record)
        trainer.record = record
        _unless_it_fails("model card", trainer.create_model_card, ())
    return RunReport(record, *pictures)


def _unless_it_fails(what: str, work: Callable, otherwise: tuple) -> tuple[tuple, str]:
    """What ``work`` returns, and no problem; else ``otherwise``, and the problem, of which there is a warning.

    A student that was trained for days must not lose its record and card to a label or an image at the end. A full
    disk is another matter: nothing could be written after it.
    """
    try:
        return work(), ""
    except Exception as error:  # of any metric, file or device
        if full_disk(error):
            raise
        logger.debug("final %s", what, exc_info=True)
        problem = (
            f"The final {what} failed ({type(error).__name__}: {first_line(error)}). The student is complete: measure "
            f"it with {command_to('evaluate')} once the reason is gone."
        )
        logger.warning(problem)
        return otherwise, problem


def _splits(trainer):
    if trainer.splits is None:
        raise ValueError("compare and report need the images themselves: give train_dataset a dataset, not views.")
    return trainer.splits


def _final_evaluator(trainer) -> Evaluator | None:
    """Of test images, which are read once, else of the images held out of train."""
    splits = _splits(trainer)
    return build_evaluator(splits, trainer.teacher, trainer.args, splits.test or splits.validation)


def _compared(trainer, final: Evaluator | None) -> dict[str, dict]:
    if final is None:
        return {}
    return evaluation.compare(final, trainer.student, trainer.project, seed=trainer.args.seed)
