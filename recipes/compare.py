"""Find the best method for your teacher, student and images: a ranked table at equal images seen.

    python recipes/compare.py --teacher facebook/dinov2-small --student timm/resnet18.a1_in1k \
        --dataset path/to/images --hours 8 --output_dir compared

Every method runs with the same seeds, from the same initial weights, on as many images as --hours allow (or
--num_images). Baselines run with them: random weights, the student's own weights if it has any, cosine alone
(lambda_ss=0), CoSS without neighbours. Methods are ranked by linear evaluation if the images have labels, otherwise by
the overlap of neighbours with the teacher's, on held-out images (--validation_size): choosing a method on test images
would bias its test result. Other flags are those of recipes/distill.py. The same command resumes where it stopped.
Another comparison in the same folder replaces its files of results; finished trials stay.
"""

from coss_hf.cli.help import show_help

show_help(__name__, "compare")

from dataclasses import dataclass, field
from pathlib import Path

from coss_hf.cli import bad_input_exits, log_to_console, parse, stopped_run_exits
from coss_hf.reporting.plots import method_plot
from coss_hf.reporting.run_record import command
from coss_hf.study.comparison import plan_comparison, ranking_metric
from coss_hf.study.single_run import OF_ONE_RUN
from coss_hf.study.sweep import take_one_gpu
from coss_hf.study.tables import comparison, images_seen, ranked
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments


@dataclass
class CompareArguments:
    """What to compare, and for how long."""

    methods: list[str] = field(
        default_factory=lambda: ["coss", "srrl", "vid", "dist", "crd", "pkt"],
        metadata={"help": "Methods to compare, written as for --method of coss-hf distill, each at its own beta."},
    )
    seeds: int = field(
        default=3, metadata={"help": "Number of runs of each method; at least 3, to tell differences from noise."}
    )
    hours: float | None = field(
        default=None, metadata={"help": "Hours for everything, on this machine; or give --num_images."}
    )
    jobs: int = field(default=1, metadata={"help": "Number of runs that train at the same time."})


ARGUMENTS = (CompareArguments, ModelArguments, DataArguments, DistillationArguments)


def main() -> None:
    log_to_console()
    take_one_gpu()  # first: the arguments are those of a training, which refuses several GPUs in one process
    with bad_input_exits():
        args, models, data, training = parse(ARGUMENTS, single_run=OF_ONE_RUN, command="compare")
        if training.method != "coss" or training.beta is not None:
            raise ValueError("--method and --beta: give --methods 'coss(beta=50)' 'rkd(beta=2)' ... to be compared.")
        plan = plan_comparison(
            "compared",
            models,
            data,
            training,
            seeds=args.seeds,
            hours=args.hours,
            jobs=args.jobs,
            methods=args.methods,
            held_out_only=True,
        )
    if plan.settings.filled:
        print(plan.settings.table(), flush=True)
    with stopped_run_exits():
        rows = plan.run()
    metric = ranking_metric(rows)
    title = ", ".join(filter(None, [plan.pair, images_seen(rows)]))
    text = "\n\n".join(filter(None, [f"# {title}", f"`{command()}`", comparison(rows, metric), plan.note]))
    folder = Path(training.output_dir)
    (folder / "compared.md").write_text(text + "\n")
    method_plot(folder / "compared.png", ranked(rows, metric), metric, title)
    print(text)


if __name__ == "__main__":
    main()
