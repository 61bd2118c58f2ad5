"""Measure what views that come back do to the student, and what a float16 cache of the teacher's embeddings does.

    python recipes/benchmarks/view_epochs.py --dataset path/to/cifar10 --teacher path/to/cifar10-resnet56 \
        --output view_epochs.jsonl

CoSS, resnet56 -> resnet20, the paper's recipe without neighbours: each image has one view an epoch, so that no setting
repeats a view more often. All runs see the same number of images in the same order; they differ in the number of epochs
after which the views come back (``--view_epochs``; 0: never). One of these numbers also runs with
``--teacher_cache_dtype float16``. Each has the seeds 1, 2, 3 (initial weights and order), and is
measured on images held out of train.

A line of the file is one run. The same command resumes where it stopped, with the cache that it keeps in a folder next
to the file.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from result_lines import add_line, read_lines
from trainer_step import machine

from coss_hf.study import paper_tables as paper
from coss_hf.study.reproduction import ReproduceArguments, study_config
from coss_hf.study.trials import StudyConfig, Trial, run_trial
from coss_hf.trainer.arguments import DataArguments

PAIR = "resnet20/resnet56"
METRICS = ("knn20", "linear", "overlap10", "cosine")


def trial(options: argparse.Namespace, seed: int) -> Trial:
    """Return the run of a seed, whatever its views."""
    return Trial(
        pair=PAIR,
        method="coss",
        expression=paper.expression(1, "coss"),
        scale=1,
        seed=seed,
        num_images=options.epochs * options.train_images,
        split="validation",
    )


def configuration(options: argparse.Namespace, view_epochs: int, cache_dtype: str | None) -> StudyConfig:
    """Return what the runs with these views share; views that never come back have no cache."""
    data = DataArguments(
        dataset=options.dataset, max_train_samples=options.train_images, validation_size=options.held_out
    )
    args = ReproduceArguments(
        pairs=[PAIR],
        view_epochs=view_epochs,
        batch_size=options.batch_size,
        use_cpu=not torch.cuda.is_available(),
        output_dir=str(files_of(options.output)),
    )
    shared = study_config(args, data, {PAIR: options.teacher})
    more = {"view_seed": 0} | ({"teacher_cache_dtype": cache_dtype} if cache_dtype else {})
    return replace(shared, training=shared.training | more)


def files_of(output: Path) -> Path:
    """Return the folder of cache and checkpoints."""
    return output.with_name(output.name + ".files")


def missing(options: argparse.Namespace) -> Iterator[tuple[int, str | None, int]]:
    """Yield views, type of the cache and seed of what the file lacks, seed by seed; most views first, which fill it."""
    done = {(row["view_epochs"], row["cache_dtype"], row["seed"]) for row in read_lines(options.output)}
    views = sorted(options.view_epochs, reverse=True)
    arms = [(epochs, "float32" if epochs else None) for epochs in views]
    arms.append((options.float16_view_epochs, "float16"))
    for seed in options.seeds:
        yield from ((*arm, seed) for arm in arms if (*arm, seed) not in done)


def summary(rows: list[dict]) -> str:
    """Return mean and standard deviation over seeds by views and type of the cache; of runs that did not diverge."""
    lines = [f"diverged: {row['failed']}" for row in rows if "failed" in row]
    rows = [row for row in rows if "failed" not in row]
    for views, dtype in dict.fromkeys((row["view_epochs"], row["cache_dtype"]) for row in rows):
        found = [row for row in rows if (row["view_epochs"], row["cache_dtype"]) == (views, dtype)]
        cells = []
        for name in METRICS:
            values = [100 * row[name] for row in found]
            spread = statistics.stdev(values) if len(values) > 1 else 0
            cells.append(f"{name} {statistics.fmean(values):.2f} ± {spread:.2f}")
        lines.append(f"{views or 'never':>5} {dtype or 'live':>8}  {len(found)} seeds  " + "  ".join(cells))
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--dataset", required=True, help="labelled images of 32 pixels, with a train split")
    parser.add_argument("--teacher", required=True, help="folder of a resnet56")
    parser.add_argument("--view_epochs", type=int, nargs="+", default=[1, 2, 5, 10, 20, 0])
    parser.add_argument("--float16_view_epochs", type=int, default=10, help="views of the runs with a float16 cache")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=40, help="epochs of each run")
    parser.add_argument("--train_images", type=int, default=2000)
    parser.add_argument("--held_out", type=int, default=1000, help="images that a run is measured on")
    parser.add_argument("--batch_size", type=int, default=128)
    return parser


def main() -> None:
    options = build_parser().parse_args()
    for view_epochs, cache_dtype, seed in missing(options):
        config = configuration(options, view_epochs, cache_dtype)
        folder = files_of(options.output) / f"{view_epochs}-{cache_dtype}-{seed}"
        start = time.perf_counter()
        row = {"view_epochs": view_epochs, "cache_dtype": cache_dtype, "train_images": options.train_images}
        row |= run_trial(trial(options, seed), config, folder)
        row["seconds"] = round(time.perf_counter() - start)
        row |= {"machine": machine(), "command": shlex.join(["python", *sys.argv])}
        add_line(options.output, row)
        print(summary([row]), flush=True)
    print(summary(read_lines(options.output)))


if __name__ == "__main__":
    main()
