"""Measure which label-free figure tells the better of two students: rank correlations with accuracy over students.

    python recipes/benchmarks/overlap_correlation.py --teacher runs/teacher-resnet56 --dataset path/to/cifar10 \
        --validation_size 5000 --output_dir runs/correlation --results overlap_correlation.json

20 students resnet20 that have seen equally many images: CoSS at several lambdas, scales, learning rates and seeds, and
other methods. Each is measured on held-out images with and without labels; Spearman's correlation is taken over the
students, not over time. The same command resumes where it stopped.
"""

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas
import torch

from coss_hf.cli import bad_input_exits, parse
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.study import paper_tables as paper
from coss_hf.study.sweep import Sweep
from coss_hf.study.trials import StudyConfig, Trial
from coss_hf.trainer.arguments import DataArguments, ModelArguments

PAIR = "resnet20/resnet56"
LAMBDAS = (0, 0.25, 0.5, 1)
SCALES = (0.5, 1.0, 4.0)
OTHERS = [(paper.ROWS[2]["L_ss"], 1.0), ("bn", 1.0), ("dist", 1.0), ("sp", 1.0), ("srrl", 1.0)]
USUAL_RATE = 0.05
RATES = {0.01: [paper.COSS], 0.2: [paper.COSS]}
SEEDS = (1,)
RIVALS = {
    "overlap of 10 nearest": lambda row: row["overlap10"],
    "mean cosine": lambda row: row["cosine"],
    "CoSS loss, held out": lambda row: row["cosine"] + row["dimension_cosine"],
    "own training loss": lambda row: -row["loss"],
    "CKA": lambda row: row["cka"],
    "effective rank": lambda row: row["effective_rank"],
}


@dataclass
class CorrelationArguments:
    """What to train, and where results go."""

    teacher: str | None = field(default=None, metadata={"help": "Folder of resnet56."})
    num_images: int = field(default=16_200, metadata={"help": "Number of images that each student sees."})
    jobs: int = field(default=2, metadata={"help": "Number of students that train in parallel."})
    use_cpu: bool = field(default=True, metadata={"help": "Run on the CPU."})
    output_dir: str = field(default="correlation", metadata={"help": "Folder of the students' results."})
    results: str | None = field(default=None, metadata={"help": "JSON file to write."})


def correlations(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Return Spearman's correlation of each rival, signed so that more is better, with each accuracy."""
    frame = pandas.DataFrame({name: [rival(row) for row in rows] for name, rival in RIVALS.items()})
    scores = ("knn10", "knn20", "linear")
    found = {score: frame.corrwith(pandas.Series([row[score] for row in rows]), method="spearman") for score in scores}
    return {name: {score: round(float(found[score][name]), 3) for score in scores} for name in RIVALS}


def trials(num_images: int) -> dict[float, list[Trial]]:
    """Return the students to train, by learning rate."""

    def trial(expression: str, scale: float = 1.0, seed: int = 0) -> Trial:
        return Trial(
            pair=PAIR,
            method=expression,
            expression=paper.scaled(expression, scale),
            scale=scale,
            seed=seed,
            num_images=num_images,
            split="validation",
        )

    usual = [trial(f"coss(beta=50, lambda_ss={weight:g})", scale) for weight in LAMBDAS for scale in SCALES]
    usual += [trial(expression, scale) for expression, scale in OTHERS]
    usual += [trial(paper.COSS, seed=seed) for seed in SEEDS]
    by_rate = {USUAL_RATE: usual}
    for rate, expressions in RATES.items():
        by_rate[rate] = [trial(expression) for expression in expressions]
    return by_rate


def run(args: CorrelationArguments, data: DataArguments) -> list[dict]:
    """Run the unfinished students and return the results of all of them."""
    models = ModelArguments(teacher=args.teacher, student=PAIR.split("/")[0], student_init="random")
    training = paper.TRAINING | {"use_cpu": args.use_cpu, "channels_last": True}
    milestones = tuple(drop / paper.EPOCHS for drop in paper.MILESTONES)
    config = StudyConfig(data, {PAIR: models}, training, milestones)
    rows = []
    for rate, students in trials(args.num_images).items():
        sweep = Sweep(Path(args.output_dir), f"rate{rate:g}", args.jobs, {"learning_rate": rate})
        results = sweep.run(students, replace(config, training=training | {"learning_rate": rate}))
        rows += [{"learning_rate": rate} | row for row in results]
        del sweep  # releases the lock of the folder
    return rows


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        args, data = parse((CorrelationArguments, DataArguments))
        if not args.teacher or not data.validation_size:
            raise ValueError("--teacher and --validation_size: give both; students are measured on held-out images.")
    rows = run(args, data)
    finished = [row for row in rows if "failed" not in row]
    same_loss = [row for row in finished if row["method"].startswith("coss")]
    found = {
        f"all {len(finished)} students": correlations(finished),
        f"the {len(same_loss)} students of CoSS": correlations(same_loss),
    }
    for name, table in found.items():
        print(f"{name}\n{pandas.DataFrame(table).T.to_string()}\n")
    if args.results:
        result = {
            "command": command(),
            "hardware": "CPU" if args.use_cpu else torch.cuda.get_device_name(),
            "versions": versions(),
            "images_seen": finished[0]["images_seen"],
            **found,
            "rows": rows,
        }
        write_json(args.results, result)


if __name__ == "__main__":
    main()
