"""Which label-free figure tells the better of two students? Rank correlations with accuracy over finished students.

    python recipes/benchmarks/overlap_correlation.py --teacher runs/teacher-resnet56 --dataset ../shared/data/cifar10 \
        --validation_size 5000 --output_dir runs/correlation --results overlap_correlation.json

20 students resnet20 that have seen equally many images: CoSS at several lambdas, scales, learning rates and seeds, and
other methods. Each is measured on held-out images with and without labels; Spearman's correlation is taken over the
students, not over time. The same command goes on where it stopped.
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
from coss_hf.study.trials import Cell, Setting
from coss_hf.trainer.arguments import DataArguments, ModelArguments

PAIR = "resnet20/resnet56"
LAMBDAS, SCALES = (0, 0.25, 0.5, 1), (0.5, 1.0, 4.0)
OTHERS = [(paper.ROWS[2]["L_ss"], 1.0), ("bn", 1.0), ("dist", 1.0), ("sp", 1.0), ("srrl", 1.0)]
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
    """How much of it."""

    teacher: str | None = field(default=None, metadata={"help": "Folder of resnet56."})
    num_images: int = field(default=16_200, metadata={"help": "That each student sees."})
    jobs: int = field(default=2, metadata={"help": "Students side by side."})
    use_cpu: bool = field(default=True, metadata={"help": "Not the GPU."})
    output_dir: str = field(default="correlation", metadata={"help": "Finished students' figures."})
    results: str | None = field(default=None, metadata={"help": "JSON file."})


def correlations(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Spearman's correlation of each rival, signed so that more is better, with each accuracy."""
    frame = pandas.DataFrame({name: [rival(row) for row in rows] for name, rival in RIVALS.items()})
    scores = ("knn10", "knn20", "linear")
    found = {score: frame.corrwith(pandas.Series([row[score] for row in rows]), method="spearman") for score in scores}
    return {name: {score: round(float(found[score][name]), 3) for score in scores} for name in RIVALS}


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with bad_input_exits():
        args, data = parse((CorrelationArguments, DataArguments))
        if not args.teacher or not data.validation_size:
            raise ValueError("--teacher and --validation_size: give both; students are measured on held-out images.")
    models = {PAIR: ModelArguments(teacher=args.teacher, student=PAIR.split("/")[0], student_init="random")}
    training = paper.TRAINING | {"use_cpu": args.use_cpu, "channels_last": True}
    plain = Setting(data, models, training, tuple(drop / paper.EPOCHS for drop in paper.MILESTONES))

    def cell(expression: str, scale: float = 1.0, seed: int = 0) -> Cell:
        scaled = paper.scaled(expression, scale)
        return Cell(PAIR, expression, scaled, scale, seed, args.num_images, "validation")

    grid = {0.05: [cell(f"coss(beta=50, lambda_ss={weight:g})", scale) for weight in LAMBDAS for scale in SCALES]}
    grid[0.05] += [cell(expression, scale) for expression, scale in OTHERS]
    grid[0.05] += [cell(paper.COSS, seed=seed) for seed in SEEDS]
    grid |= {rate: [cell(expression) for expression in some] for rate, some in RATES.items()}
    rows = []
    for rate, cells in grid.items():
        setting = replace(plain, training=training | {"learning_rate": rate})
        sweep = Sweep(Path(args.output_dir), f"rate{rate:g}", setting, args.jobs, {"learning_rate": rate})
        rows += [{"learning_rate": rate} | row for row in sweep.run(cells)]
        del sweep  # lets go of the folder
    finished = [row for row in rows if "failed" not in row]
    same_loss = [row for row in finished if row["method"].startswith("coss")]
    hardware = "CPU" if args.use_cpu else torch.cuda.get_device_name()
    result = {"command": command(), "hardware": hardware, "versions": versions()}
    result |= {"images_seen": finished[0]["images_seen"]}
    result |= {f"all {len(finished)} students": correlations(finished)}
    result |= {f"the {len(same_loss)} students of CoSS": correlations(same_loss)}
    for name, found in list(result.items())[4:]:
        print(f"{name}\n{pandas.DataFrame(found).T.to_string()}\n")
    if args.results:
        write_json(args.results, result | {"rows": rows})


if __name__ == "__main__":
    main()
