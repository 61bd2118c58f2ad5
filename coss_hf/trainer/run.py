"""A run from its first step to the page that it leaves."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from coss_hf.data.loading import ImageSplits
from coss_hf.evaluation.evaluator import Evaluator, compare, sample
from coss_hf.models.backbone import Backbone
from coss_hf.reporting.run_report import NeighborExamples, write_page, write_pictures, write_record
from coss_hf.reporting.wandb_tracker import report_end_of_run
from coss_hf.trainer.reloading import check_reload
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.distributed import leave
from coss_hf.utils.ending import ENDING


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


@dataclass
class DistillationRun:
    """A run that ``factory.build_run`` has put together: ``train``, then ``report``, then ``publish``.

    Attributes:
        trainer: ready for the first step.
        splits: the images.
        checkpoint: the one to resume from, checked; None for a fresh start.
    """

    trainer: DistillationTrainer
    splits: ImageSplits
    checkpoint: str | None = None

    def train(self) -> None:
        """Train, save the student, leave the process group, and load the student again as anybody would.

        Nothing after this needs the other processes.

        Raises:
            RunStopped: the loss became not finite, something could not be written, or what was saved does not load.
        """
        trainer = self.trainer
        args = trainer.args
        if args.overwrite_output_dir and not args.resume_from_checkpoint and args.process_index == 0:
            for old in Path(args.output_dir).glob("checkpoint-*"):
                shutil.rmtree(old)
        trainer.train(resume_from_checkpoint=self.checkpoint or args.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # not pushed yet
        with trainer.checkpoints.disk_full_as_checkpoint_error():
            trainer.save_state()
        leave()
        resumable = any(Path(args.output_dir).glob("checkpoint-*"))
        then = "give the same command with --resume_from_checkpoint" if resumable else "use recipes/evaluate.py"
        ENDING.remedy = f"The student is saved in {args.output_dir}, but was not evaluated to the end: {then}."
        ENDING.heed()  # a signal of the last step
        if args.process_index == 0:
            head = trainer.full_model.head
            check_reload(args.output_dir, trainer.student, head, self.splits.train, self.splits.image_column)

    def report(self) -> RunReport:
        """Compare the student with teacher and random weights, and write record, pictures, page and card next to it.

        On the first process alone. Images of the test split are read once, here. The record's ``results`` are empty
        without test or validation images.

        Raises:
            CheckpointError: the disk is full.
        """
        trainer = self.trainer
        args = trainer.args
        final = build_evaluator(self.splits, trainer.teacher, args, self.splits.test or self.splits.validation)
        results = compare(final, trainer.student, trainer.project, seed=args.seed) if final else {}
        with trainer.checkpoints.disk_full_as_checkpoint_error():
            record = write_record(args.output_dir, trainer, results, self.splits)
            neighbors, projection = write_pictures(args.output_dir, trainer, final)
            write_page(args.output_dir, trainer, record)
            trainer.create_model_card(record=record)
        return RunReport(record, neighbors, projection)

    def publish(self, report: RunReport) -> None:
        """Push the student with ``--push_to_hub``, and then tell W&B, which may keep a run waiting.

        On the first process alone.

        Raises:
            PushFailed: the student is on disk; the message says how to push it.
        """
        try:
            if self.trainer.args.push_to_hub:
                self.trainer.push_output_dir()
        finally:
            report_end_of_run(self.trainer, report.record, report.neighbors, report.projection)


def build_evaluator(
    splits: ImageSplits,
    teacher: Backbone,
    args: DistillationArguments,
    test_images: Dataset | None,
    *,
    during_training: bool = False,
) -> Evaluator | None:
    """Build the evaluation on held-out images, against the training images; None without held-out images.

    Args:
        splits: the images.
        teacher: compared with.
        args: of the training.
        test_images: held-out images.
        during_training: with diagnostics, against a sample of the training images, instead of with retrieval.
    """
    if test_images is None:
        return None
    return Evaluator(
        teacher,
        test_images,
        splits.image_column,
        label_column=splits.label_column,
        train_images=sample(splits.train, args.eval_bank_size if during_training else None),
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        diagnostics=during_training,
        retrieval=not during_training,
    )
