"""Train a teacher and its student on scikit-learn's handwritten digits: minutes on two CPU cores.

    python recipes/quickstart.py [--seeds 0 1 2] [--output quickstart]

It writes the digits as parquet, trains a small labelled teacher (recipes/train_teacher.py), distils it without labels
into a smaller student (recipes/distill.py), and prints how well the embeddings of test images tell their classes. Each
command is printed before it runs. It needs scikit-learn, which the extra `quickstart` installs.
"""

from coss_hf.cli.help import as_commands, show_help

show_help(__name__, "quickstart")

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL.Image import fromarray

from coss_hf.cli import bad_input_exits
from coss_hf.cli.paths import path
from coss_hf.evaluation.knn import knn_accuracy
from coss_hf.evaluation.linear_probe import linear_probe
from coss_hf.evaluation.tables import table
from coss_hf.reporting.run_record import versions, write_json
from coss_hf.utils.packages import check_extra

# Others wrote the last 360 digits: no writer is in both splits.
TRAIN = 1437
TEACHER = "--model resnet8x4 --hidden_sizes 32 64 128 --image_size 8 --mean .5 .5 .5 --std .5 .5 .5"
TEACHER += " --num_train_epochs 20 --logging_steps 44"
# On 8x8 pixels a second thread only waits for the first; a second process decodes and augments instead.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
WORKERS = ["--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"]


def bundled_digits():
    """Return scikit-learn's digits; exit with the remedy where it is not installed."""
    with bad_input_exits():
        check_extra("sklearn", needed_by="The quickstart, whose digits come with scikit-learn,")
    from sklearn.datasets import load_digits

    return load_digits()


def write_digits(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Write ``train.parquet`` and ``test.parquet`` (8x8 grey PNG, label); return pixels ``(n, 64)`` and labels."""
    digits = bundled_digits()
    pixels = np.rint(digits.images * 255 / 16).astype(np.uint8)  # their maximum is 16
    labels = digits.target
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for name, rows in (("train", slice(TRAIN)), ("test", slice(TRAIN, None))):
        images = [fromarray(image) for image in pixels[rows]]
        dataset = Dataset.from_dict({"image": images, "label": labels[rows]}, features=features)
        dataset.to_parquet(folder / f"{name}.parquet")
        splits[name] = torch.from_numpy(pixels[rows]).flatten(1).float(), torch.from_numpy(labels[rows])
    return splits


def raw_pixels(splits: dict) -> dict[str, float]:
    """Return the scores of pixels as embeddings: a baseline without any network."""
    train = splits["train"]
    test = splits["test"]
    return knn_accuracy(*train, *test) | {"probe": linear_probe(*train, *test)["accuracy"]}


def run(title: str, *words) -> None:
    """Run a command of coss-hf as a user would type it."""
    words = [str(word) for word in words]
    variables = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
    shown = shlex.join(["coss-hf", *words])
    print(f"\n{title}\n$ {variables} {shown}", flush=True)
    start = time.perf_counter()
    if subprocess.run([sys.executable, "-m", "coss_hf", *words], env=os.environ | ENVIRONMENT).returncode:
        raise SystemExit(f"This command failed: {shown}")
    print(f"({time.perf_counter() - start:.0f} s)")


def pipeline(output: Path, seed: int) -> dict[str, dict]:
    """Train teacher and student of one seed; return what recipes/distill.py measured on test images."""
    teacher = output / f"seed{seed}" / "teacher"
    student = output / f"seed{seed}" / "student"
    common = ["--dataset", output / "data", "--seed", seed, "--use_cpu", "--overwrite_output_dir", *WORKERS]
    train = ["train-teacher", *TEACHER.split(), "--output_dir", teacher]
    run(f"A labelled teacher, seed {seed}:", *train, *common)
    distil = ["distill", "--config", "quickstart", "--teacher", teacher, "--output_dir", student]
    run(f"Its student, without labels, seed {seed}:", *distil, *common)
    return json.loads((student / "run.json").read_text())["results"]


def over_seeds(runs: list[dict[str, dict]], statistic) -> dict[str, dict]:
    """Return a table of ``statistic`` of each figure over the seeds."""
    return {
        row: {key: statistic([run[row][key] for run in runs]) for key, value in figures.items() if type(value) is float}
        for row, figures in runs[0].items()
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coss-hf quickstart",
        description=as_commands(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="Seeds; each trains one teacher and one student. Default: 0."
    )
    parser.add_argument(
        "--output",
        type=path,
        default=Path("quickstart"),
        help="Folder to which images, networks and results are written. Default: quickstart.",
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    splits = write_digits(args.output / "data")
    sizes = ", ".join(f"{name} {len(labels):,}" for name, (_, labels) in splits.items())
    print(f"Digits: {sizes} images of 8x8 pixels.")
    runs = [pipeline(args.output, seed) | {"raw pixels": raw_pixels(splits)} for seed in args.seeds]
    mean = over_seeds(runs, np.mean)
    for name, figures in mean.items():
        if "parameters" in runs[0][name]:
            figures["parameters"] = runs[0][name]["parameters"]
    print(f"\nTest images (%), mean of seeds {', '.join(map(str, args.seeds))}:\n\n{table(mean)}")
    record = {
        "command": shlex.join(sys.argv),
        "seeds": args.seeds,
        "mean": mean,
        "runs": runs,
        "versions": versions(),
    }
    if len(runs) > 1:
        record["standard_deviation"] = over_seeds(runs, statistics.stdev)
        print(f"\nStandard deviation over the seeds:\n\n{table(record['standard_deviation'])}")
    write_json(args.output / "results.json", record)
    student = args.output / f"seed{args.seeds[0]}" / "student"
    print(
        f"\nFigures: {args.output}/results.json. The student: {student}, for AutoModel and AutoImageProcessor."
        f"\nNearest neighbours of test images: {student}/neighbors.png. Its loss: {student}/loss.png."
    )


if __name__ == "__main__":
    main()
