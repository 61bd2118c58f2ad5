"""Where a run is put together: from arguments to a trainer that is ready for its first step."""

from functools import partial

import numpy as np
from torch import nn
from transformers import TrainerCallback

from coss_hf.data.loading import ImageSplits
from coss_hf.evaluation.evaluator import Evaluator
from coss_hf.models.backbone import Backbone
from coss_hf.reporting.run_record import to_dict
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.checkpoint_files import claim_output_dir, find_checkpoint
from coss_hf.trainer.inputs import Prepared, load_networks, read_images
from coss_hf.trainer.rehearsal import rehearse
from coss_hf.trainer.run import DistillationRun
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import check_present, command_line


@command_line()
def build_run(models: ModelArguments, data: DataArguments, args: DistillationArguments) -> DistillationRun:
    """Build everything up to the first training step; all bad input is found here, what is cheap to find first.

    Args:
        models: teacher and student.
        data: images and the search for neighbours.
        args: of the training.

    Raises:
        ValueError: any input that the run cannot use.
    """
    checkpoint = claim_output_dir(args, args.resume_from_checkpoint, dry_run=args.dry_run)
    student = models.student or models.student_init == "teacher_layers"
    check_present(teacher=models.teacher, student=student, dataset=data.dataset)
    teacher, student = load_networks(args, models.load_teacher, models.load_student)
    if data.streaming:
        args.check_stream()
    rehearse(student, teacher, args)
    splits = read_images(args, checkpoint, partial(data.load, hold_out_by_default=True, streams=True))
    if args.eval_strategy != "no" and not args.evaluates_by_default and splits.validation is None:
        raise ValueError(
            f"--eval_strategy={args.eval_strategy.value} needs images held out of train: give --validation_size. (Test "
            f"images are read once, at the end.)"
        )
    prepared = Prepared(checkpoint, has_claimed=not args.dry_run)
    trainer = build_trainer(splits, args, teacher=teacher, student=student, data=data, prepared=prepared)
    trainer.arguments = to_dict(models, data, trainer.args)
    if not args.dry_run:
        trainer.check_checkpoint(checkpoint)
    return DistillationRun(trainer, checkpoint)


@command_line()
def build_trainer(
    splits: ImageSplits,
    args: DistillationArguments,
    *,
    teacher: Backbone,
    student: Backbone,
    data: DataArguments | None = None,
    neighbors: np.ndarray | None = None,
    evaluator: Evaluator | None = None,
    criterion: nn.Module | None = None,
    callbacks: list[TrainerCallback] | None = None,
    prepared: Prepared | None = None,
) -> DistillationTrainer:
    """Build a trainer from networks, images and arguments; neighbours are found last, since that takes longest.

    Args:
        splits: the images.
        args: of the training.
        teacher: frozen.
        student: to be trained.
        data: how neighbours are searched and where they are kept; default: ``DataArguments()``.
        neighbors: ``(n, K)`` rows of each training image's neighbours, instead of a search.
        evaluator: see ``DistillationTrainer``.
        criterion: see ``DistillationTrainer``.
        callbacks: see ``DistillationTrainer``.
        prepared: the checkpoint to resume from, where it was looked for already.

    Raises:
        ValueError: any input that the run cannot use.
    """
    return DistillationTrainer(
        teacher,
        student,
        args,
        splits,
        evaluator=evaluator,
        criterion=criterion,
        data=data,
        neighbors=neighbors,
        callbacks=callbacks,
        prepared=prepared or Prepared(find_checkpoint(args.output_dir, args.resume_from_checkpoint)),
    )
