"""Train a supervised teacher on labelled images.

    python recipes/train_teacher.py --model resnet56 --dataset path/to/labelled/images --output_dir teacher

    python recipes/train_teacher.py --model google/vit-base-patch16-224-in21k --dataset path/to/labelled/images \
        --augmentation imagenet --num_train_epochs 10 --learning_rate 0.01 --output_dir teacher

--model is a CIFAR network, at random weights, or any checkpoint, which gets a new classifier where the classes differ.
The output folder loads with AutoModelForImageClassification, and as --teacher of recipes/distill.py. Defaults are the
paper's for CIFAR-100, but for the rate: a cosine. The paper's steps are --lr_milestones 150 180 210.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "train-teacher")

from coss_hf.utils.ending import ENDING

if __name__ == "__main__":
    ENDING.install()  # before the imports that take seconds

from coss_hf.cli import bad_input_exits, log_to_console, parse, stopped_run_exits
from coss_hf.trainer.arguments import DataArguments
from coss_hf.trainer.supervised import TeacherArguments, build_supervised_run

ARGUMENTS = (DataArguments, TeacherArguments)


def main() -> None:
    log_to_console()
    with bad_input_exits():
        data, args = parse(ARGUMENTS)
        run = build_supervised_run(data, args)
    print(f"{run.backbone!r}, {len(run.splits.train):,} images", flush=True)
    with stopped_run_exits():
        record = run.train()
    if record is not None:
        print(f"Teacher written to {args.output_dir}.")


if __name__ == "__main__":
    main()
