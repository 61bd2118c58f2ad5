"""A run from its first step to the page that it leaves."""

from dataclasses import dataclass
from pathlib import Path

from coss_hf.reporting.trackers import report_end_of_run
from coss_hf.trainer.checkpoint_files import remove_earlier_run
from coss_hf.trainer.run_results import RunReport
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.utils.distributed import leave
from coss_hf.utils.ending import ENDING
from coss_hf.utils.messages import command_line, command_to


@dataclass
class DistillationRun:
    """A run that ``factory.build_run`` has put together: ``train``, then ``report``, then ``publish``.

    Attributes:
        trainer: ready for the first step.
        checkpoint: the one to resume from, checked; None for a fresh start.
    """

    trainer: DistillationTrainer
    checkpoint: str | None = None

    @command_line()
    def train(self) -> None:
        """Train, save the student, leave the process group, and load the student again as anybody would.

        Nothing after this needs the other processes.

        Raises:
            RunStopped: the loss became not finite, something could not be written, or what was saved does not load.
        """
        trainer = self.trainer
        args = trainer.args
        remove_earlier_run(args, args.resume_from_checkpoint)
        trainer.train(resume_from_checkpoint=self.checkpoint or args.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # not pushed yet
        with trainer.checkpoints.disk_full_as_checkpoint_error(student_saved=True):
            trainer.save_state()
        leave()
        resumable = any(Path(args.output_dir).glob("checkpoint-*"))
        then = "give the same command with --resume_from_checkpoint" if resumable else f"use {command_to('evaluate')}"
        ENDING.remedy = f"The student is saved in {args.output_dir}, but was not evaluated to the end: {then}."
        ENDING.heed()  # a signal of the last step
        trainer.check_reload(args.output_dir)

    @command_line()
    def report(self) -> RunReport:
        """Write record, pictures, page and card: see ``DistillationTrainer.report``. On the first process alone."""
        return self.trainer.write_report()

    @command_line()
    def publish(self, report: RunReport) -> None:
        """Push the student with ``--push_to_hub``, and then tell the trackers: W&B may keep a run waiting.

        On the first process alone.

        Raises:
            PushFailed: the student is on disk; the message says how to push it.
        """
        try:
            if self.trainer.args.push_to_hub:
                self.trainer.push_output_dir()
        finally:
            report_end_of_run(self.trainer, report)
