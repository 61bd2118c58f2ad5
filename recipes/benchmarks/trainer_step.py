"""Measure what a step through DistillationTrainer costs beyond the same step in a bare PyTorch loop.

    python recipes/benchmarks/trainer_step.py --output trainer_step.json

Both train resnet20 towards resnet56 on the same random tensors in memory. After every trainer step one bare step runs,
so that each pair meets the machine in the same state; quote the medians. glibc returns freed memory to the system and
takes it again at the next step, at a cost that depends on the heap's layout: the script restarts itself with that
switched off, for both loops alike.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from transformers import TrainerCallback, set_seed

from coss_hf.data.views import ViewDataset
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetModel
from coss_hf.models.cifar.registry import cifar_config, cifar_image_processor
from coss_hf.models.loading import load_backbone
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments

KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_MMAP_THRESHOLD_": str(2**34)}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def restart_with_kept_memory() -> None:
    """Restart this program once, so that freed memory is kept by the process."""
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def machine() -> str:
    """Return processor, threads and version of torch."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save_networks(folder: str, names: Iterable[str]) -> None:
    """Save CIFAR networks at random weights, each in a subfolder of its name."""
    for name in names:
        CifarResNetModel(cifar_config(name)).save_pretrained(f"{folder}/{name}")
        cifar_image_processor(*IMAGENET).save_pretrained(f"{folder}/{name}")


def now() -> float:
    """Return the time in seconds, once the work begun on a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class InMemory(ViewDataset):
    """Views in memory, which cost nothing to make and are the same in each epoch.

    Args:
        count: number of views, of as many images.
        size: side of a view in pixels.
        view_epochs: as of ``ViewDataset``.
    """

    def __init__(self, count: int, size: int = 32, view_epochs: int = 0):
        columns = {"image": [Image.new("RGB", (8, 8))] * count, "image_hash": [str(row) for row in range(count)]}
        features = Features({"image": ImageFeature(), "image_hash": Value("string")})
        rows = Dataset.from_dict(columns, features=features)
        super().__init__(rows, "image", "none", size, view_epochs=view_epochs)
        self.views = torch.randint(0, 256, (count, 1, 3, size, size), dtype=torch.uint8)

    def __getitems__(self, rows: list[int]) -> list[dict]:
        items = [{"pixel_values": self.views[row], "index": torch.tensor([row])} for row in rows]
        if self.teacher_cache is not None:
            cached = self.teacher_cache.items(0, rows, [[False]] * len(rows))
            items = [item | more for item, more in zip(items, cached, strict=True)]
        return items


class BareLoop(TrainerCallback):
    """Run one step of a bare loop after every step of the trainer, and time both."""

    def __init__(self, teacher, student, batch_size: int, views):
        self.teacher = teacher.model
        self.student = student.model
        self.batch_size = batch_size
        self.views = views
        mean, std = IMAGENET
        self.mean = torch.tensor(mean).view(1, 3, 1, 1) * 255
        self.std = torch.tensor(std).view(1, 3, 1, 1) * 255
        self.optimizer = torch.optim.SGD(self.student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
        self.pairs = []  # seconds of a trainer step and of a bare one
        self.start = None

    def step(self) -> None:
        rows = torch.randint(len(self.views), (self.batch_size,))
        device = next(self.student.parameters()).device
        pixels = (self.views[rows, 0].to(device).float() - self.mean.to(device)) / self.std.to(device)
        with torch.no_grad():
            t = self.teacher(pixels).pooler_output.flatten(1)
        s = self.student(pixels).pooler_output.flatten(1)
        columns, rows = (nn.functional.cosine_similarity(s, t, dim=dim).mean() for dim in (0, 1))
        loss = -50 * (rows + columns)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def on_step_end(self, args, state, control, **kwargs):
        reached = now()
        self.step()
        end = now()
        if self.start is not None:
            self.pairs.append((reached - self.start, end - reached))
        self.start = time.perf_counter()


def measure(batch_size: int, steps: int, folder: str, teacher_name: str) -> dict:
    """Return the median time of trainer and bare steps, and the spread of their paired ratio."""
    save_networks(folder, (teacher_name, "resnet20"))
    teacher = load_backbone(f"{folder}/{teacher_name}")
    student = load_backbone(f"{folder}/resnet20")
    data = InMemory(batch_size * 8)
    args = DistillationArguments(
        f"{folder}/out",
        settings="paper",
        per_device_train_batch_size=batch_size,
        max_steps=steps + 5,
        save_strategy="no",
        logging_steps=50,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    other = load_backbone(f"{folder}/resnet20")
    bare = BareLoop(copy.copy(teacher).freeze(), other, batch_size, data.views)
    other.model.to(args.device).train()
    # Not through the factory, which makes its views from images: these are tensors in memory.
    DistillationTrainer(teacher, student, args, data, callbacks=[bare]).train()
    pairs = bare.pairs[4:]
    ratios = sorted(trainer / loop for trainer, loop in pairs)
    return {
        "teacher": teacher_name,
        "student": "resnet20",
        "batch_size": batch_size,
        "steps": len(pairs),
        "trainer_ms": round(1e3 * statistics.median(t for t, _ in pairs), 2),
        "bare_ms": round(1e3 * statistics.median(b for _, b in pairs), 2),
        "overhead_ms": round(1e3 * statistics.median(t - b for t, b in pairs), 2),
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[3 * len(ratios) // 4], 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="pairs at batch 128; ten times as many of short steps")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    restart_with_kept_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    set_seed(0)
    result = {
        "command": f"python recipes/benchmarks/trainer_step.py --steps {options.steps} --threads {options.threads}",
        "machine": machine(),
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        result["batch_128"] = measure(128, options.steps, folder, "resnet56")
        result["short_step"] = measure(4, 10 * options.steps, folder, "resnet20")
    print(json.dumps(result, indent=2))
    if options.output:
        Path(options.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
