"""Distil a teacher into a student, without labels.

    accelerate launch recipes/distill.py --teacher google/vit-base-patch16-224 --student timm/resnet18.a1_in1k \
        --dataset path/to/images --output_dir my-student

    accelerate launch recipes/distill.py --config recipes/configs/cifar10_resnet56_resnet20.yaml --seed 1

Every argument can stand in a YAML file given with --config; the command line overrides it. --dry_run shows what a run
would do. The output folder loads with AutoModel and AutoImageProcessor.
"""

import logging
import shutil
from pathlib import Path

import numpy as np
from transformers import set_seed

from coss_hf.cli.parser import bad_input_exits, parse, stopped_run_exits
from coss_hf.data.loading import ImageSplits
from coss_hf.data.views import ViewDataset
from coss_hf.evaluation.evaluator import Evaluator, compare, sample
from coss_hf.evaluation.tables import table
from coss_hf.neighbors.columns import check_neighbors, check_pool
from coss_hf.neighbors.mining import nearest_neighbors
from coss_hf.reporting.run_record import to_dict
from coss_hf.reporting.run_report import write_page, write_pictures, write_record
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.checkpoint_files import find_checkpoint, hold, recover
from coss_hf.trainer.dry_run import describe
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.distributed import leave
from coss_hf.utils.process_group import Processes


def prepare(models: ModelArguments, data: DataArguments, args: DistillationArguments):
    """Everything up to the first training step; all bad input is found here, what is cheap to find first."""
    refuse_overwriting(args)
    with Processes().first(args.local_process_index == 0):
        splits = data.load(watched=True)
    teacher = models.load_teacher()
    set_seed(args.seed)
    student = models.load_student(teacher)
    if args.eval_strategy != "no" and not args.watched and splits.validation is None:
        raise ValueError(
            f"--eval_strategy={args.eval_strategy.value} needs images held out of train: give --validation_size. (Test "
            f"images are read once, at the end.)"
        )
    teacher.model.to(args.device)
    size = max(*teacher.size, *student.size) if args.view_size is None else args.view_size
    views = ViewDataset(splits.train, splits.image_column, args.augmentation, size, seed=args.seed)
    held_out = sample(splits.validation, args.eval_sample_size)
    trainer = DistillationTrainer(
        student, teacher, args, views, evaluator(splits, teacher, args, held_out, diagnostics=True)
    )
    trainer.arguments = to_dict(models, data, args)
    if args.neighbors_k:
        views.use_neighbors(find_neighbors(splits, teacher, data, args), args.neighbors_k)
    if not args.dry_run:
        trainer.find_checkpoint(args.resume_from_checkpoint)  # refuses that of another run
    return trainer, splits


def evaluator(splits: ImageSplits, teacher, args: DistillationArguments, test_images, diagnostics: bool = False):
    """Evaluator on ``test_images``, against all training images or for diagnostics a sample; None without images."""
    if test_images is None:
        return None
    return Evaluator(
        teacher,
        test_images,
        splits.image_column,
        label_column=splits.label_column,
        train_images=sample(splits.train, args.eval_bank_size if diagnostics else None),
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        diagnostics=diagnostics,
        retrieval=not diagnostics,
    )


def refuse_overwriting(args: DistillationArguments) -> None:
    """A finished or interrupted run is not written over by mistake; a checkpoint to resume from is there."""
    output = Path(args.output_dir)
    if not args.dry_run:
        with args.main_process_first(local=False, desc="checkpoints"):
            if args.process_index == 0:
                hold(output)
                # Only if asked to go on: a refusal changes nothing.
                if args.resume_from_checkpoint or args.overwrite_output_dir:
                    recover(output)
    checkpoint = find_checkpoint(output, args.resume_from_checkpoint)
    used = (output / "model.safetensors").exists() or any(output.glob("checkpoint-*"))
    if used and checkpoint is None and not (args.overwrite_output_dir or args.dry_run):
        resume = (
            "it has no complete checkpoint to resume from"
            if args.resume_from_checkpoint
            else ("continue it with --resume_from_checkpoint")
        )
        raise ValueError(
            f"--output_dir={output} already holds a run: {resume}, replace it with --overwrite_output_dir, or give "
            f"another folder."
        )


def find_neighbors(splits: ImageSplits, teacher, data: DataArguments, args: DistillationArguments):
    """Neighbour indices (n, K) of the training images: those that came with them, or the teacher's."""
    train = splits.train
    if "neighbors" in train.column_names:
        return check_neighbors(train, args.neighbors_pool)
    if args.dry_run:  # as many as would be, without looking
        check_pool(args.neighbors_pool, len(train))
        return (np.arange(len(train))[:, None] + np.arange(1, args.neighbors_pool + 1)) % len(train)
    return nearest_neighbors(  # a task of all processes together
        train,
        teacher,
        splits.image_column,
        k=args.neighbors_pool,
        options=data,
        cache_dir=data.neighbors_cache,
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
    )[0]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        models, data, args = parse((ModelArguments, DataArguments, DistillationArguments))
        trainer, splits = prepare(models, data, args)
    text = describe(trainer, splits, measure=args.dry_run)
    if args.process_index == 0:
        print(text, flush=True)
    if args.dry_run:
        return
    if args.overwrite_output_dir and not args.resume_from_checkpoint and args.process_index == 0:
        for old in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)

    with stopped_run_exits():
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        trainer.save_model(_internal_call=True)  # not pushed yet
        with trainer.room():
            trainer.save_state()
    leave()

    if args.process_index == 0:
        final = evaluator(splits, trainer.teacher, args, splits.test or splits.validation)
        results = compare(final, trainer.student, trainer.project, seed=args.seed) if final else {}
        with stopped_run_exits(), trainer.room():
            record = write_record(args.output_dir, trainer, results, splits)
            pictures = write_pictures(args.output_dir, trainer, final)
            write_page(args.output_dir, trainer, record)
            trainer.create_model_card(record=record)
        print(table(results) if results else "No test or validation images: nothing was evaluated.")
        with stopped_run_exits():
            trainer.finish(record, *pictures)


if __name__ == "__main__":
    main()
