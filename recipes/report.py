"""Report whether distillation helped: CoSS and its baselines at equal images seen, quality against cost, on one page.

    python recipes/report.py --teacher facebook/dinov2-small --student timm/resnet18.a1_in1k \
        --dataset path/to/images --hours 8 --output_dir report

Rows: random weights, the student's own weights if it has any, cosine alone (lambda_ss=0), CoSS without neighbours (with
--neighbors_k), CoSS, the teacher. Each trained row runs with the same seeds, from the same initial weights, on as many
images as --hours allow (or --num_images). Quality is measured on test images (without any, on those that
--validation_size, or else the command itself, holds out): linear evaluation, probe, k-NN and retrieval if there are
labels, agreement with the teacher in any case. Cost is measured on this machine: parameters, multiply-adds, bytes,
latency. Other flags are those of recipes/distill.py. The same command resumes where it stopped. `report.html` in the
output folder is the page; report.jsonl, report.json, report.md and report.png are its rows, costs, table and plot.
Another report in the same folder replaces them; finished trials stay.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "report")

from dataclasses import dataclass, field
from pathlib import Path

from coss_hf.cli import bad_input_exits, log_to_console, parse, stopped_run_exits
from coss_hf.reporting.run_record import command, versions
from coss_hf.study.comparison import plan_comparison, ranking_metric
from coss_hf.study.costs import costs, device_name
from coss_hf.study.report import Report
from coss_hf.study.single_run import OF_ONE_RUN
from coss_hf.study.sweep import take_one_gpu
from coss_hf.study.tables import images_seen, seen_by
from coss_hf.study.trials import load
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import command_to


@dataclass
class ReportArguments:
    """How long the report may take, and how exact it is."""

    seeds: int = field(
        default=3, metadata={"help": "Number of runs of each row; at least 3, to tell differences from noise."}
    )
    hours: float | None = field(
        default=None, metadata={"help": "Hours for everything, on this machine; or give --num_images."}
    )
    jobs: int = field(default=1, metadata={"help": "Number of runs that train at the same time."})
    timing_rounds: int = field(default=20, metadata={"help": "Number of timed runs of each network and batch size."})


ARGUMENTS = (ReportArguments, ModelArguments, DataArguments, DistillationArguments)


def check(args: ReportArguments, training: DistillationArguments) -> None:
    """Refuse what a report does not read.

    Raises:
        ValueError: another method, another beta, or no timed round.
    """
    for name in ("method", "beta"):
        if name in training.given:
            raise ValueError(
                f"--{name}={getattr(training, name)}: a report is of CoSS at its own beta; leave it out, or compare "
                f"other methods with {command_to('compare')} --methods."
            )
    if args.timing_rounds < 1:
        raise ValueError(f"--timing_rounds={args.timing_rounds} must be at least 1: give such a number.")


def main() -> None:
    log_to_console()
    take_one_gpu()  # first: the arguments are those of a training, which refuses several GPUs in one process
    with bad_input_exits():
        args, models, data, training = parse(ARGUMENTS, single_run=OF_ONE_RUN, command="report")
        check(args, training)
        plan = plan_comparison("report", models, data, training, seeds=args.seeds, hours=args.hours, jobs=args.jobs)
    if plan.settings.filled:
        print(plan.settings.table(), flush=True)
    with stopped_run_exits():
        rows = plan.run()
        _, teacher = load(plan.config, plan.pair)
        networks = {"student": models.load_student(teacher), "teacher": teacher}
    _, most = seen_by(rows) or (0, 0)
    names = f"{Path(models.teacher).name} → {Path(models.student or models.student_init).name}"
    report = Report(
        title=", ".join(filter(None, [names, images_seen(rows), f"{args.seeds} seeds"])),
        rows=rows,
        metric=ranking_metric(rows),
        split=plan.split,
        images_seen=most,
        costs=costs(networks, training.device, args.timing_rounds),
        hardware=device_name(training.device),
        command=command(),
        versions=versions(),
        note=plan.note,
    )
    print(report.write(Path(training.output_dir)), flush=True)


if __name__ == "__main__":
    main()
