"""Which method is best for my teacher, student and images? A ranked table at equal images seen.

    python recipes/compare.py --teacher facebook/dinov2-small --student timm/resnet18.a1_in1k \
        --dataset path/to/images --hours 8 --neighbors_k 3 --output_dir compared

Every method runs with the same seeds, from the same initial weights, on as many images as --hours allow (or
--num_images). Controls run with them: random weights, the student's own if it has any, cosine alone
(lambda_ss=0), CoSS without neighbours. Where the images have labels methods are ranked by linear evaluation, else by
the overlap of neighbours with the teacher's, on held-out images (--validation_size): a method is chosen here, and what
is chosen on test images cannot be believed of them. Flags are those of recipes/distill.py. The same command goes on
where it stopped.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from coss_hf.cli import bad_input_exits, parse
from coss_hf.data.loading import MAX_DEFAULT_VALIDATION_SIZE
from coss_hf.reporting.plots import method_plot
from coss_hf.reporting.run_record import command
from coss_hf.study.baselines import changed, check_study, length, trained_cells, untrained_cells
from coss_hf.study.sweep import Sweep
from coss_hf.study.tables import comparison, ranked
from coss_hf.study.trials import Setting, load
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments


@dataclass
class CompareArguments:
    """What to compare, and for how long."""

    methods: list[str] = field(
        default_factory=lambda: ["coss", "srrl", "vid", "dist", "crd", "pkt"],
        metadata={"help": "Expressions as --method of recipes/distill.py, each at its own beta."},
    )
    seeds: int = field(default=3, metadata={"help": "Runs of each method; 3 at least tell noise from difference."})
    hours: float | None = field(default=None, metadata={"help": "Of everything, on this machine; or --num_images."})
    jobs: int = field(default=1, metadata={"help": "Runs side by side."})


def check(args: CompareArguments, models: ModelArguments, training: DistillationArguments, splits) -> str:
    """Name of the split that is measured on. Raises ValueError for what cannot be compared."""
    if training.method != "coss" or training.beta is not None:
        raise ValueError("--method and --beta: give --methods 'coss(beta=50)' 'rkd(beta=2)' ... to be compared.")
    check_study(training, args.hours, args.seeds, args.jobs, splits)
    if splits.validation is None:
        raise ValueError("--validation_size: hold images out of train, say 2000, to compare the methods on.")
    return "validation"


def held_out(data: DataArguments) -> int | float:
    """Images to hold out: by default as many as a training does, where the dataset has none of its own."""
    if data.validation_size is not None:
        return data.validation_size
    splits = data.load()
    return 0 if splits.validation is not None else min(MAX_DEFAULT_VALIDATION_SIZE, len(splits.train) // 10)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        args, models, data, training = parse((CompareArguments, ModelArguments, DataArguments, DistillationArguments))
        folder, pair = Path(training.output_dir), f"{models.student} / {models.teacher}"
        data.validation_size = held_out(data)
        setting = Setting(data, {pair: models}, changed(training)).identified()
        split = check(args, models, training, load(setting, pair)[0])
        sweep = Sweep(folder, "compared", setting, args.jobs, {"command": command()})
        trained = trained_cells(pair, training, args.seeds, split, args.methods)
        sweep.check(trained)
        others = untrained_cells(pair, models, args.seeds, split)
        images = training.num_images or length(folder, args.hours, trained, others, setting)
    trained = [replace(cell, num_images=images) for cell in trained]
    results = sweep.run(trained + others)
    metric = "linear" if any(row.get("linear") is not None for row in results) else "overlap10"
    title = f"{pair}, {images:,} images seen"
    text = f"# {title}\n\n`{command()}`\n\n" + comparison(results, metric)
    (folder / "compared.md").write_text(text + "\n")
    method_plot(folder / "compared.png", ranked(results, metric), metric, title)
    print(text)


if __name__ == "__main__":
    main()
