"""Distil a teacher into a student, without labels.

    accelerate launch recipes/distill.py --teacher google/vit-base-patch16-224 --student timm/resnet18.a1_in1k \
        --dataset path/to/images --output_dir my-student

    accelerate launch recipes/distill.py --config cifar10_resnet56_resnet20 --teacher path/to/resnet56 \
        --dataset path/to/cifar10 --seed 1

Every argument can stand in a YAML file given with --config, or in one that comes with the package, given by its name;
the command line overrides it. --dry_run shows what a run would do. The output folder loads with AutoModel and
AutoImageProcessor.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "distill")

from coss_hf.utils.ending import ENDING

if __name__ == "__main__":
    ENDING.install()  # before the imports that take seconds

from coss_hf.cli import bad_input_exits, log_to_console, parse, stopped_run_exits
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.dry_run import describe
from coss_hf.trainer.factory import build_run
from coss_hf.trainer.training_args import DistillationArguments

ARGUMENTS = (ModelArguments, DataArguments, DistillationArguments)


def main() -> None:
    log_to_console()
    with bad_input_exits():
        models, data, args = parse(ARGUMENTS)
        run = build_run(models, data, args)
    text = describe(run.trainer, measure=args.dry_run)
    if args.process_index == 0:
        print(text, flush=True)
    if args.dry_run:
        return
    with stopped_run_exits():
        run.train()
        if args.process_index == 0:
            report = run.report()
            print(run.trainer.closing_summary(report.record), flush=True)
            run.publish(report)


if __name__ == "__main__":
    main()
