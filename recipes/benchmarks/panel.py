"""Measure what the diagnostics on held-out images cost: their share of training time at the default interval.

    python recipes/benchmarks/panel.py --teacher runs/teacher-resnet56 --dataset path/to/cifar10 \
        --output panel.json

resnet20 learns from resnet56 at batch 128; every 20 steps 2,000 images are evaluated, with labels (k-NN and probe
against 2,000 training images) and without. Medians of steps and of evaluations in the same run; the first evaluation,
which embeds the teacher's side, is left out. By default there is one evaluation in 50,000 images seen.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from trainer_step import machine, restart_with_kept_memory
from transformers import TrainerCallback, set_seed

from coss_hf.data.loading import ImageSplits, load_images
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.factory import build_trainer
from coss_hf.trainer.inputs import build_evaluator
from coss_hf.trainer.training_args import EVAL_IMAGES, DistillationArguments
from coss_hf.utils.messages import command_line

BATCH = 128
INTERVAL = 20  # steps
HELD_OUT = 2000


class Clock(TrainerCallback):
    """Measure seconds of each evaluation, and of each step that does not follow one."""

    def __init__(self):
        self.steps = []
        self.evaluations = []
        self.last = None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.last is not None:
            self.steps.append(now - self.last)
        self.last = now

    def on_evaluate(self, args, state, control, **kwargs):
        # Steps end before their evaluation begins.
        if self.last is not None:
            self.evaluations.append(time.perf_counter() - self.last)
        self.last = None


def measure(options: argparse.Namespace, splits: ImageSplits) -> dict:
    """Return the share of an evaluation in its own time and that of 50,000 images."""
    set_seed(0)
    teacher = load_backbone(options.teacher, argument="teacher")
    student = load_backbone("resnet20", argument="student", init="random", teacher=teacher)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            output_dir=folder,
            settings="paper",
            augmentation="cifar",
            seed=0,
            eval_train_size=2000,
            per_device_train_batch_size=BATCH,
            max_steps=INTERVAL * (options.panels + 1),
            eval_steps=INTERVAL,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        evaluator = build_evaluator(splits, teacher, args, splits.validation, during_training=True)
        build_trainer(splits, args, teacher=teacher, student=student, evaluator=evaluator, callbacks=[clock]).train()
    evaluations = clock.evaluations[1:]
    evaluation = statistics.median(evaluations)
    step = statistics.median(clock.steps)
    between = EVAL_IMAGES / BATCH * step
    return {
        "panel_seconds": round(evaluation, 2),
        "panels_range": [round(min(evaluations), 2), round(max(evaluations), 2)],
        "training_seconds": round(between, 1),
        "images_per_second": round(BATCH / step, 1),
        "share": round(evaluation / (evaluation + between), 4),
    }


@command_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--panels", type=int, default=5, help="number of evaluations that are timed")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    restart_with_kept_memory()
    splits = load_images(options.dataset, validation_size=HELD_OUT)
    result = {
        "command": f"python recipes/benchmarks/panel.py --teacher ... --dataset ... --panels {options.panels}",
        "machine": machine(),
        "with_labels": measure(options, splits),
        "without_labels": measure(options, splits._replace(label_column=None)),
    }
    print(json.dumps(result, indent=2))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
