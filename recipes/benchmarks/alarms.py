"""A healthy run, one whose teacher is shuffled, one that collapses: which alarms each raises, on real images.

    python recipes/benchmarks/alarms.py --teacher runs/teacher-resnet56 --dataset ../shared/data/cifar10 \
        --output alarms.json

resnet20 from random weights. Shuffled: each image gets the teacher's embedding of another image of its batch, as where
images and stored embeddings are out of step. Collapsing: a learning rate of 100 instead of 0.05. The panel (2,000
images held out, without labels) is taken before the first step and four times after it.
"""

import argparse
import json
import logging
import tempfile

import torch
from transformers import set_seed

from coss_hf.data.loading import load_images
from coss_hf.data.views import ViewDataset
from coss_hf.evaluation.diagnostics import alarms, evaluations
from coss_hf.evaluation.evaluator import Evaluator, sample
from coss_hf.features import Features
from coss_hf.models.loading import load_backbone
from coss_hf.reporting.run_record import command, versions, write_json
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments

RUNS = {"healthy": {}, "shuffled": {}, "collapsing": {"learning_rate": 100.0}}


class ShuffledTrainer(DistillationTrainer):
    """Gives each image the teacher's embedding of the next one."""

    def embed_teacher(self, views):
        return Features(super().embed_teacher(views).embedding.roll(1, dims=0))


def run(name: str, options: argparse.Namespace, splits) -> dict:
    """Panels and alarms of a run."""
    set_seed(options.seed)
    teacher = load_backbone(options.teacher, argument="teacher")
    student = load_backbone("resnet20", argument="student", init="random", teacher=teacher)
    views = ViewDataset(splits.train, splits.image_column, "cifar", 32, seed=options.seed)
    evaluator = Evaluator(teacher, sample(splits.validation, 2000), splits.image_column, diagnostics=True)
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            output_dir=folder,
            num_images=options.num_images,
            eval_steps=max(1, options.num_images // 128 // 4),
            eval_on_start=True,
            save_strategy="no",
            seed=options.seed,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            **RUNS[name],
        )
        kind = ShuffledTrainer if name == "shuffled" else DistillationTrainer
        trainer = kind(student, teacher, args, views, evaluator)
        trainer.train()
    history = trainer.state.log_history
    names = ("images_seen", "overlap10", "effective_rank", "teacher_effective_rank", "duplicates")
    raised = {}
    for end in range(1, len(history) + 1):  # those that come and go, too
        raised = alarms(history[:end], len(evaluator.test_images), finished=end == len(history)) | raised
    return {
        "alarms": raised,
        "panels": [{key: entry[key] for key in names} for entry in evaluations(history)],
        "last_loss": next(entry["loss"] for entry in reversed(history) if "loss" in entry),
    }


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--num_images", type=int, default=12_800)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    splits = load_images(options.dataset, validation_size=2000)
    result = {"command": command(), "versions": versions()}
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    result |= {name: run(name, options, splits) for name in options.runs}
    print(json.dumps(result, indent=2))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    main()
