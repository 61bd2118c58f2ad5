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

from transformers import set_seed

from coss_hf.config import DataArguments, DistillationArguments, ModelArguments, bad_input_exits, parse, to_dict
from coss_hf.estimate import describe
from coss_hf.evaluation import table
from coss_hf.evaluation.evaluator import Evaluator, compare
from coss_hf.images import ImageSplits, load_images
from coss_hf.loading import load_backbone
from coss_hf.neighbors import add_neighbors, check_neighbors
from coss_hf.report import write_pictures, write_record
from coss_hf.trainer import DistillationTrainer
from coss_hf.views import ViewDataset


def prepare(models: ModelArguments, data: DataArguments, args: DistillationArguments):
    """Everything up to the first training step; all bad input is found here."""
    for name, value in (("teacher", models.teacher), ("dataset", data.dataset)):
        if not value:
            raise ValueError(f"--{name} is missing; see --help.")
    if not models.student and models.student_init != "teacher_layers":
        raise ValueError("--student is missing; see --help.")
    refuse_overwriting(args)
    with args.main_process_first(desc="images"):
        splits = load_images(
            data.dataset,
            name=data.dataset_name,
            revision=data.dataset_revision,
            train_split=data.train_split,
            test_split=data.test_split,
            image_column=data.image_column,
            label_column=data.label_column,
            validation_size=data.validation_size,
            max_train_samples=data.max_train_samples,
            on_bad_image=data.on_bad_image,
            num_proc=data.preprocessing_num_workers,
        )
    stretch = {"interpolate_pos_encoding": models.interpolate_pos_encoding}
    teacher = load_backbone(**models.loading("teacher"), **stretch)
    set_seed(args.seed)
    student = load_backbone(
        **models.loading("student"),
        **stretch,
        init=models.student_init,
        config_overrides=models.overrides(),
        teacher=teacher,
    )
    teacher.freeze().model.to(args.device)
    with args.main_process_first(desc="neighbours"):
        neighbors = find_neighbors(splits, teacher, data, args)
    size = args.view_size or max(*teacher.size, *student.size)
    views = ViewDataset(
        splits.train,
        splits.image_column,
        args.augmentation,
        size,
        seed=args.seed,
        neighbors=neighbors,
        k=args.neighbors_k,
    )
    if args.eval_strategy != "no" and splits.validation is None:
        raise ValueError(
            f"--eval_strategy={args.eval_strategy.value} needs images held out of train: give --validation_size. (Test "
            f"images are read once, at the end.)"
        )
    watch = evaluator(splits, teacher, args, splits.validation, bank_size=args.eval_bank_size)
    return DistillationTrainer(student, teacher, args, views, watch), splits


def evaluator(splits: ImageSplits, teacher, args: DistillationArguments, queries, bank_size: int | None = None):
    """Evaluator of ``queries`` against the training images, or None without queries."""
    if queries is None:
        return None
    bank = splits.train if bank_size is None else splits.train.select(range(min(bank_size, len(splits.train))))
    options = {"batch_size": args.per_device_eval_batch_size, "num_workers": args.dataloader_num_workers}
    return Evaluator(teacher, queries, splits.image_column, label_column=splits.label_column, bank=bank, **options)


def refuse_overwriting(args: DistillationArguments) -> None:
    """A finished or interrupted run is not written over by mistake."""
    output = Path(args.output_dir)
    used = (output / "model.safetensors").exists() or any(output.glob("checkpoint-*"))
    if used and not (args.resume_from_checkpoint or args.overwrite_output_dir or args.dry_run):
        raise ValueError(
            f"--output_dir={output} already holds a run: continue it with --resume_from_checkpoint, replace it with "
            f"--overwrite_output_dir, or give another folder."
        )


def find_neighbors(splits: ImageSplits, teacher, data: DataArguments, args: DistillationArguments):
    """Neighbour indices (n, K) of the training images, or None."""
    if not args.neighbors_k:
        return None
    train = splits.train
    if "neighbors" not in train.column_names:
        train = add_neighbors(
            train,
            teacher,
            splits.image_column,
            k=args.neighbors_pool,
            cache_dir=data.neighbors_cache,
            batch_size=args.per_device_eval_batch_size,
            num_workers=args.dataloader_num_workers,
        )
    return check_neighbors(train, args.neighbors_pool)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        models, data, args = parse((ModelArguments, DataArguments, DistillationArguments))
        trainer, splits = prepare(models, data, args)
    if args.process_index == 0:
        print(describe(trainer, splits, measure=args.dry_run), flush=True)
    if args.dry_run:
        return
    if args.overwrite_output_dir and not args.resume_from_checkpoint and args.process_index == 0:
        for old in Path(args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(old)

    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()

    final = evaluator(splits, trainer.teacher, args, splits.test or splits.validation)
    results = compare(final, trainer.student, trainer.project, seed=args.seed) if final else {}
    if args.process_index == 0:
        write_record(args.output_dir, trainer, results, to_dict(models, data, args), splits.bad_images)
        write_pictures(args.output_dir, trainer, final)
        print(table(results) if results else "No test or validation images: nothing was evaluated.")
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
