"""What the panel of held-out images costs: its share of training time at the default interval.

    python recipes/benchmarks/panel.py --teacher runs/teacher-resnet56 --dataset ../shared/data/cifar10 \
        --output panel.json

resnet20 learns from resnet56 at batch 128; every 20 steps a panel of 2,000 images is taken, with labels (k-NN and probe
against 2,000 training images) and without. Medians of steps and of panels in the same run; the first panel, which
embeds the teacher's side, is left out. By default one panel is taken in 50,000 images seen.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from trainer_step import KEEP_MEMORY
from transformers import TrainerCallback, set_seed

from coss_hf.data.loading import load_images
from coss_hf.data.views import ViewDataset
from coss_hf.evaluation.evaluator import Evaluator, sample
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import EVAL_IMAGES, DistillationArguments

BATCH, INTERVAL = 128, 20


class Clock(TrainerCallback):
    """Seconds of each step but those that follow a panel, and of each panel."""

    def __init__(self):
        self.steps, self.panels, self.last = [], [], None

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.last is not None:
            self.steps.append(now - self.last)
        self.last = now

    def on_evaluate(self, args, state, control, **kwargs):
        # Steps end before their evaluation begins.
        if self.last is not None:
            self.panels.append(time.perf_counter() - self.last)
        self.last = None


def measure(options: argparse.Namespace, splits, labels: str | None) -> dict:
    """Share of a panel in the time of 50,000 images and itself."""
    set_seed(0)
    teacher = load_backbone(options.teacher, argument="teacher")
    student = load_backbone("resnet20", argument="student", init="random", teacher=teacher)
    data = ViewDataset(splits.train, splits.image_column, "cifar", 32)
    evaluator = Evaluator(
        teacher,
        sample(splits.validation, 2000),
        splits.image_column,
        label_column=labels,
        train_images=sample(splits.train, 2000),
        diagnostics=True,
    )
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=INTERVAL * (options.panels + 1),
            eval_steps=INTERVAL,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        DistillationTrainer(student, teacher, args, data, evaluator, callbacks=[clock]).train()
    panel, step = statistics.median(clock.panels[1:]), statistics.median(clock.steps)
    between = EVAL_IMAGES / BATCH * step
    return {
        "panel_seconds": round(panel, 2),
        "panels_range": [round(min(clock.panels[1:]), 2), round(max(clock.panels[1:]), 2)],
        "training_seconds": round(between, 1),
        "images_per_second": round(BATCH / step, 1),
        "share": round(panel / (panel + between), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--panels", type=int, default=5)
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    splits = load_images(options.dataset, validation_size=2000)
    result = {
        "command": f"python recipes/benchmarks/panel.py --teacher ... --dataset ... --panels {options.panels}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "with_labels": measure(options, splits, splits.label_column),
        "without_labels": measure(options, splits, None),
    }
    print(json.dumps(result, indent=2))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
