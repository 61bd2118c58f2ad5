"""Which method is best for my teacher, student and images? A ranked table at equal images seen.

    python recipes/compare.py --teacher facebook/dinov2-small --student timm/resnet18.a1_in1k \
        --dataset path/to/images --hours 8 --neighbors_k 3 --output_dir compared

Every method runs with the same seeds, from the same initial weights, on as many images as --hours allow (or
--num_images). Controls run with them: random weights, cosine alone (lambda_ss=0), CoSS without neighbours. Where the
images have labels methods are ranked by linear evaluation, else by the overlap of neighbours with the teacher's, on
test images (or --validation_size held-out ones). Flags are those of recipes/distill.py. The same command goes on where
it stopped.
"""

import json
import logging
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from coss_hf.cli import bad_input_exits, parse
from coss_hf.config import DataArguments, DistillationArguments, ModelArguments
from coss_hf.plots import method_plot
from coss_hf.report import command, write_json
from coss_hf.study.cells import Cell, Setting, load
from coss_hf.study.sweep import Sweep
from coss_hf.study.tables import comparison, ranked
from coss_hf.study.timing import images_within

CELL = ("output_dir", "method", "seed", "num_images", "neighbors_k", "beta", "lambda_ss")


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


def rows(args: CompareArguments, training: DistillationArguments) -> list[tuple[str, str, int]]:
    """Name, expression and neighbours of each row: the methods and the controls, each once."""
    k = training.neighbors_k
    found = [("coss, cosine only", "coss(lambda_ss=0)", k), ("coss", "coss", k)]
    if k:
        found.append(("coss, no neighbours", "coss", 0))
    return found + [(method, method, k) for method in args.methods if method != "coss"]


def check(args: CompareArguments, models: ModelArguments, training: DistillationArguments, splits) -> str:
    """Name of the split that is measured on. Raises ValueError for what cannot be compared."""
    if training.method != "coss" or training.beta is not None:
        raise ValueError("--method and --beta: give --methods 'coss(beta=50)' 'rkd(beta=2)' ... to be compared.")
    if (args.hours is None) == (training.num_images is None):
        raise ValueError("--hours or --num_images: give one of them, the length of the comparison.")
    if args.hours is not None and args.hours <= 0:
        raise ValueError(f"--hours={args.hours} must be above 0.")
    if args.seeds < 2 or args.jobs < 1:
        raise ValueError(
            f"--seeds={args.seeds} must be at least 2, 3 to be believed, and --jobs={args.jobs} at least 1."
        )
    if splits.test is None and splits.validation is None:
        raise ValueError("--validation_size: there is no test split, so hold images out of train to compare on.")
    return "test" if splits.test is not None else "validation"


def changed(given: DistillationArguments) -> dict:
    """What differs from the defaults, and holds for every run."""
    plain = DistillationArguments(use_cpu=given.use_cpu)
    names = [one.name for one in fields(given) if one.init and one.name not in CELL]
    found = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(plain, name)}
    return found | {"use_cpu": given.use_cpu}


def length(folder: Path, hours: float, trained: list[Cell], others: list[Cell], setting: Setting) -> int:
    """Images of a run, so that all fit the hours. Kept: a second look would find other speeds, and make other cells."""
    path = folder / "length.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("hours") != hours:
        known = {"hours": hours, "num_images": images_within(3600 * hours, trained, others, setting)}
        write_json(path, known)
    return known["num_images"]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        args, models, data, training = parse((CompareArguments, ModelArguments, DataArguments, DistillationArguments))
        folder, pair = Path(training.output_dir), f"{models.student} / {models.teacher}"
        setting = Setting(data, {pair: models}, changed(training))
        split = check(args, models, training, load(setting, pair)[0])
        sweep = Sweep(folder, "compared", setting, args.jobs, {"command": command()})
        trained = [
            Cell(pair, name, expression, 1, seed, training.num_images, split, k)
            for name, expression, k in rows(args, training)
            for seed in range(1, args.seeds + 1)
        ]
        sweep.check(trained)
        others = [Cell(pair, "random", "", 0, seed, 0, split) for seed in range(1, args.seeds + 1)]
        others.append(Cell(pair, "teacher", "", 0, 1, 0, split))
        images = training.num_images or length(folder, args.hours, trained, others, setting)
    trained = [replace(cell, num_images=images) for cell in trained]
    results = sweep.run(trained + others)
    metric = "eval_linear" if any(row.get("eval_linear") is not None for row in results) else "eval_overlap10"
    title = f"{pair}, {images:,} images seen"
    text = f"# {title}\n\n`{command()}`\n\n" + comparison(results, metric)
    (folder / "compared.md").write_text(text + "\n")
    method_plot(folder / "compared.png", ranked(results, metric), metric, title)
    print(text)


if __name__ == "__main__":
    main()
