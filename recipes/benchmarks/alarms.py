"""Show which alarms a healthy run, one with a shuffled teacher and one that collapses raise, on real images.

    python recipes/benchmarks/alarms.py --teacher runs/teacher-resnet56 --dataset path/to/cifar10 \
        --output alarms.json

The student is resnet20 from random weights. Shuffled: each image gets the teacher's embedding of another image of its
batch, as if images and stored embeddings were out of step. Collapsing: a learning rate of 100 instead of 0.05. The
diagnostics (2,000 images held out, without labels) are evaluated before the first step and four times after it.
"""

import argparse
import json
import logging
import tempfile

import torch
from torch import Tensor
from transformers import set_seed

from coss_hf.data.loading import ImageSplits, load_images
from coss_hf.evaluation.diagnostics import alarms, evaluations
from coss_hf.features import Features
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.trainer.factory import build_trainer
from coss_hf.trainer.inputs import build_evaluator
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import command_line

HELD_OUT = 2000
LEARNING_RATES = {"healthy": 0.05, "shuffled": 0.05, "collapsing": 100.0}
SHOWN = ("images_seen", "overlap10", "effective_rank", "teacher_effective_rank", "duplicates")


def shuffle_teacher(trainer: DistillationTrainer) -> None:
    """Give each image the teacher's embedding of the next one, from now on."""
    embed_teacher = trainer.embed_teacher

    def shuffled(views: Tensor) -> Features:
        return Features(embed_teacher(views).embedding.roll(1, dims=0))

    trainer.embed_teacher = shuffled


def train(name: str, options: argparse.Namespace, splits: ImageSplits) -> list[dict]:
    """Train one student and return its log."""
    set_seed(options.seed)
    teacher = load_backbone(options.teacher, argument="teacher")
    student = load_backbone("resnet20", argument="student", init="random", teacher=teacher)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            output_dir=folder,
            settings="paper",
            num_images=options.num_images,
            learning_rate=LEARNING_RATES[name],
            augmentation="cifar",
            eval_steps=max(1, options.num_images // 128 // 4),
            eval_on_start=True,
            save_strategy="no",
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        # Without labels.
        unlabelled = splits._replace(label_column=None)
        evaluator = build_evaluator(unlabelled, teacher, args, splits.validation, during_training=True)
        trainer = build_trainer(splits, args, teacher=teacher, student=student, evaluator=evaluator)
        if name == "shuffled":
            shuffle_teacher(trainer)
        trainer.train()
    return trainer.state.log_history


def summarize(history: list[dict], images: int) -> dict:
    """Return the alarms of a run, those that come and go included, with its evaluations and its last loss."""
    raised = {}
    for end in range(1, len(history) + 1):
        raised = alarms(history[:end], images, finished=end == len(history)) | raised
    return {
        "alarms": raised,
        "panels": [{name: entry[name] for name in SHOWN} for entry in evaluations(history)],
        "last_loss": next(entry["loss"] for entry in reversed(history) if "loss" in entry),
    }


@command_line()
def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--num_images", type=int, default=12_800)
    parser.add_argument("--runs", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    splits = load_images(options.dataset, validation_size=HELD_OUT)
    result = {"command": command(), "versions": versions()}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    for name in options.runs:
        result[name] = summarize(train(name, options, splits), len(splits.validation))
    print(json.dumps(result, indent=2))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
