"""Run each YAML file for photographs once, for real but short, with a small teacher and small students.

    python recipes/benchmarks/configs.py --dataset path/to/imagenette --teacher path/to/efficientnet-lite1 \
        --trained_student recipes/benchmarks/results/cifar100-resnet56 --output configs.jsonl

Each file runs as ``coss-hf distill --config NAME`` with everything that it says, apart from the networks, the images,
their size and number held out, and the length of the run. Its line in the output is what the run wrote into
``run.json``. The same command resumes with the first file that has no line.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from photographs import VIT_TINY
from result_lines import add_line, read_lines

from coss_hf.study.costs import device_name

CONFIGS = Path(__file__).parents[1] / "configs"
RANDOM = ("--student_init", "random", "--student")
CNN = (*RANDOM, "timm_wrapper", "--student_config_overrides", "architecture=resnet18")
VIT = (*RANDOM, "vit", "--student_config_overrides", *VIT_TINY, "image_size=96", "patch_size=16")
# The student of each file, in place of the published one that it names.
STUDENTS = {
    "cnn_photographs": CNN,
    "vit_photographs": VIT,
    "small_set_pretrained": None,  # --trained_student
    "retrieval": CNN,
    "imagenet_paper": CNN,
}


def command(name: str, options: argparse.Namespace) -> list[str]:
    """Return the words after ``coss-hf`` that run a file."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    views = config["per_device_train_batch_size"] * (1 + config.get("neighbors_k", 0))
    student = STUDENTS[name] or ("--student", options.trained_student)
    words = ["distill", "--config", name, "--teacher", options.teacher, "--teacher_size", str(options.size), *student]
    if STUDENTS[name]:
        words += ["--student_size", str(options.size)]
    words += ["--dataset", options.dataset, "--validation_size", "500", "--max_steps", str(options.num_images // views)]
    if not torch.cuda.is_available():
        words += ["--use_cpu", *(["--fp16", "false"] if config.get("fp16") else [])]
    return words


def run(name: str, options: argparse.Namespace) -> dict:
    """Run a file and return its row.

    Raises:
        SystemExit: the run failed, and has said why.
    """
    folder = options.output.with_name(f"{options.output.name}.files") / name
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: it begins anew
    words = command(name, options)
    start = time.perf_counter()
    code = subprocess.run(
        [sys.executable, "-m", "coss_hf", *words, "--output_dir", str(folder)], check=False
    ).returncode
    if code:
        raise SystemExit(code)
    record = json.loads((folder / "run.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = {"config": name, "seconds": round(time.perf_counter() - start), "machine": device_name(device)}
    kept = (
        "images_seen",
        "teacher",
        "student",
        "results",
        "verdict",
        "alarms",
        "evaluated_images",
        "settings",
        "versions",
    )
    row |= {key: record[key] for key in kept} | {"command": shlex.join(["coss-hf", *words])}
    shutil.rmtree(folder)
    return row


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="labelled photographs with a train split")
    parser.add_argument("--teacher", required=True, help="a network of photographs")
    parser.add_argument(
        "--trained_student",
        required=True,
        help="folder of a small network, as Transformers saves it, that was trained on other images",
    )
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--configs", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--num_images", type=int, default=6400, help="images that each student sees")
    parser.add_argument("--size", type=int, default=96, help="pixels of the views; the trained student keeps its own")
    return parser


def main() -> None:
    options = build_parser().parse_args()
    done = {row["config"] for row in read_lines(options.output)}
    for name in options.configs:
        if name not in done:
            row = run(name, options)
            add_line(options.output, row)
            print(f"{name}: {row['verdict'][0]}", flush=True)


if __name__ == "__main__":
    main()
