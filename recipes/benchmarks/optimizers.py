"""Train one student by the starting values of several optimizers, at equal images seen, and measure on held-out images.

    python recipes/benchmarks/optimizers.py --optimizers adamw_torch sgd --folder optimizers --use_cpu \
        --teacher recipes/benchmarks/results/cifar100-resnet56 --student resnet20 --student_init random \
        --dataset path/to/cifar100 --validation_size 5000 --augmentation cifar --num_images 25600 \
        --view_epochs 1 --view_seed 0 --teacher_cache optimizers/teacher

All options of ``coss-hf distill`` may be given; what is left out is filled by ``--settings auto``, which has a rate, a
decay and a clipping for each optimizer; ``paper`` is ``--settings paper``. Three seeds each; test images are not read.
Each line of optimizers.jsonl is one run, or the student at its initial weights. The same command resumes where it
stopped.
"""

import argparse
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from result_lines import add_line, read_lines
from transformers import set_seed

from coss_hf.cli import parse
from coss_hf.reporting.run_record import versions
from coss_hf.study.trials import StudyConfig, Trial, build_trial_trainer, load, measure
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.training_args import DistillationArguments

EVERYTHING = (ModelArguments, DataArguments, DistillationArguments)
START = "initial weights"
SEEDS = (1, 2, 3)
# What each run sets for itself, or is only about how it runs.
OF_RUN = ("output_dir", "optim", "method", "seed", "num_images", "neighbors_k")


def shared(words: list[str], folder: Path) -> tuple[StudyConfig, Trial]:
    """Return what the runs share, and their trial, whose seed is 0."""
    models, data, args = parse(EVERYTHING, [*words, f"--output_dir={folder}"])
    training = {name: getattr(args, name) for name in args.given if name not in OF_RUN}
    training |= {"dataloader_num_workers": 0, "save_strategy": "steps", "save_steps": 100}
    trial = Trial("student", "coss", args.method, 1, 0, args.num_images, "validation", args.neighbors_k)
    return StudyConfig(data, {"student": models}, training), trial


def run(optimizer: str, trial: Trial, config: StudyConfig, folder: Path) -> dict:
    """Train by one optimizer, or not at all, and return the row."""
    names = {"student": Path(config.models[trial.pair].student).name, "dataset": Path(config.data.dataset).name}
    row = names | {"optimizer": optimizer, "seed": trial.seed, "split": trial.split}
    if optimizer == START:
        _, teacher = load(config, trial.pair)
        set_seed(trial.seed)
        return row | {"images_seen": 0} | measure(trial, config, config.models[trial.pair].load_student(teacher))
    own = {"settings": "paper"} if optimizer == "paper" else {"optim": optimizer}
    config = replace(config, training=config.training | own)
    trainer = build_trial_trainer(trial, config, folder)
    filled = {name: getattr(trainer.args, name) for name in ("learning_rate", "weight_decay", "max_grad_norm")}
    trainer.train(resume_from_checkpoint=trainer.find_checkpoint("auto"))
    metrics = measure(trial, config, trainer.student, trainer.project)
    shutil.rmtree(folder, ignore_errors=True)
    return row | {"images_seen": trainer.images_seen} | filled | metrics


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--optimizers", nargs="+", required=True, help="values of --optim; paper: --settings paper")
    parser.add_argument("--folder", type=Path, required=True, help="folder of checkpoints and of optimizers.jsonl")
    options, words = parser.parse_known_args()
    if any(word.partition("=")[0] == "--optim" for word in words):
        parser.error("--optim is one optimizer: give --optimizers")
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "optimizers.jsonl"
    done = {(row["optimizer"], row["seed"]) for row in read_lines(file)}
    config, trial = shared(words, options.folder)
    for seed in SEEDS:
        for optimizer in (START, *options.optimizers):
            if (optimizer, seed) in done:
                continue
            row = run(optimizer, replace(trial, seed=seed), config, options.folder / f"{optimizer}-{seed}")
            add_line(file, row | {"command": shlex.join(["python", *sys.argv]), "versions": versions()})
            print(f"{optimizer}, seed {seed}: k-NN 20 {row['knn20']:.4f}, linear {row['linear']:.4f}", flush=True)


if __name__ == "__main__":
    main()
