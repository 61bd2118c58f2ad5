"""Reproduce the paper's tables on your own images: pairs x methods x scales of the loss, and fresh seeds to report.

    python recipes/reproduce.py --table 1 --dataset path/to/cifar10 --validation_size 5000 \
        --pairs resnet20/resnet56 --teacher runs/teacher-resnet56 --scales 0.5 1 4 --finalists 4 --budget 0.005 \
        --jobs 2 --use_cpu --output_dir runs/table1

Scales are chosen with one seed on --validation_size images held out of train, then reported with other seeds on test
images, which are read once per reported trial. Labels serve evaluation alone. --budget is a share of the paper's 240
epochs. The same command resumes where it stopped and never repeats a finished trial.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "reproduce")


from coss_hf.cli import bad_input_exits, log_to_console, parse, stopped_run_exits
from coss_hf.study.reproduction import ReproduceArguments, plan_reproduction
from coss_hf.trainer.arguments import DataArguments

ARGUMENTS = (ReproduceArguments, DataArguments)


def main() -> None:
    log_to_console()
    with bad_input_exits():
        args, data = parse(ARGUMENTS)
        reproduction = plan_reproduction(args, data)
    with stopped_run_exits():
        table = reproduction.run()
    print(table)


if __name__ == "__main__":
    main()
