"""Train with CoSS in a plain PyTorch loop, to compare the trainer's speed and results with.

    python recipes/benchmarks/bare_loop.py --teacher TEACHER --seed 0 --train_parquet TRAIN.parquet --output OUT

An interrupted run resumes from OUT/resume.pt; a finished one is left as it is.
"""

import argparse
import io
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetModel
from coss_hf.models.cifar.registry import cifar_config, cifar_image_processor

BETA = 50.0
LAMBDA = 0.5
LEARNING_RATE = 0.05
CHECKPOINT_STEPS = 500


def initial_student(seed: int) -> CifarResNetModel:
    """Return resnet20 with padding shortcuts and the random weights of ``seed``."""
    torch.manual_seed(seed)
    return CifarResNetModel(cifar_config("resnet20", shortcut="padding"))


def save(model: CifarResNetModel, folder: str | Path) -> None:
    """Save a network with its image processor."""
    model.save_pretrained(folder)
    cifar_image_processor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).save_pretrained(folder)


def decode(parquet: str) -> torch.Tensor:
    """Return all images of the file, uint8 ``(n, 3, 32, 32)``."""
    records = pyarrow.parquet.read_table(parquet, columns=["image"])["image"].to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(record["bytes"])).convert("RGB")) for record in records]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def views(images: torch.Tensor, corner: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Crop images within a black border of 4 pixels, and flip them horizontally.

    Args:
        images: ``(b, 3, 32, 32)``.
        corner: ``(b, 2)`` row and column of the crop's corner, 0 to 8.
        flip: ``(b,)`` whether to flip.
    """
    rows = corner[:, 0, None] + torch.arange(32)
    columns = corner[:, 1, None] + torch.arange(32)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    sample = torch.arange(len(images))[:, None, None]
    return F.pad(images, (4, 4, 4, 4))[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: a cosine after a linear warm-up over 5 % of the steps."""
    warmup = math.ceil(0.05 * steps)
    if step < warmup:
        return LEARNING_RATE * step / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def coss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return minus the mean cosine over the rows (images), minus LAMBDA times that over the columns (dimensions)."""
    rows, columns = (F.cosine_similarity(student, teacher, dim=dim, eps=1e-12).mean() for dim in (1, 0))
    return -rows - LAMBDA * columns


@dataclass
class Epoch:
    """Order, crops and flips of an epoch: they depend on the seed and its number alone, so there is no state to resume.

    Attributes:
        order: ``(n,)`` rows of the images.
        corner: ``(n, 2)`` corner of each image's crop.
        flip: ``(n,)`` whether each image is flipped.
    """

    order: torch.Tensor
    corner: torch.Tensor
    flip: torch.Tensor

    @classmethod
    def draw(cls, number: int, seed: int, images: int) -> "Epoch":
        generator = torch.Generator().manual_seed(1000 * number + seed)
        return cls(
            order=torch.randperm(images, generator=generator),
            corner=torch.randint(9, (images, 2), generator=generator),
            flip=torch.rand(images, generator=generator) < 0.5,
        )

    def batch(self, images: torch.Tensor, number: int, size: int) -> torch.Tensor:
        """Return the views of a batch."""
        chosen = self.order[number * size :][:size]
        return views(images[chosen], self.corner[chosen], self.flip[chosen])


@dataclass
class Progress:
    """What a run has done so far.

    Attributes:
        step: number of steps.
        seconds: time of the steps.
        log: mean losses and seconds, every 100 steps.
        losses: loss of each step, divided by BETA.
    """

    step: int = 0
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class Run:
    """A student, its optimizer and its progress.

    Args:
        student: the network to train.
        output: folder of the student and of ``resume.pt``.
    """

    def __init__(self, student: CifarResNetModel, output: Path):
        self.student = student
        self.output = output
        self.optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        self.progress = Progress()

    def resume(self) -> None:
        """Load ``resume.pt``, if there is one."""
        path = self.output / "resume.pt"
        if path.exists():
            state = torch.load(path)
            self.student.load_state_dict(state.pop("student"))
            self.optimizer.load_state_dict(state.pop("optimizer"))
            self.progress = Progress(**state)

    def checkpoint(self) -> None:
        """Replace ``resume.pt``, atomically."""
        state = vars(self.progress) | {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.output / "resume.tmp")
        os.replace(self.output / "resume.tmp", self.output / "resume.pt")

    def train(self, forward: Callable, images: torch.Tensor, steps: int, batch_size: int, seed: int) -> None:
        """Take the steps that are left.

        Args:
            forward: the loss of a batch of views.
            images: all training images.
            steps: number of steps of the full run.
            batch_size: number of images of a step.
            seed: seed of order, crops and flips.
        """
        progress = self.progress
        steps_per_epoch = len(images) // batch_size
        epoch = None
        clock = time.perf_counter()
        for step in range(progress.step, steps):
            number, position = divmod(step, steps_per_epoch)
            if epoch is None or position == 0:
                epoch = Epoch.draw(number, seed, len(images))
            loss = forward(epoch.batch(images, position, batch_size))
            self.optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            progress.losses.append(loss.item() / BETA)
            progress.step = step + 1
            if progress.step % 100 == 0 or progress.step == steps:
                progress.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
                mean = BETA * float(np.mean(progress.losses[-100:]))
                progress.log.append({"step": progress.step, "loss": mean, "seconds": progress.seconds})
                print(
                    f"step {progress.step}/{steps}  loss/beta {progress.losses[-1]:.4f}  {progress.seconds:.0f} s",
                    flush=True,
                )
            if progress.step % CHECKPOINT_STEPS == 0:
                self.checkpoint()


def loss_function(
    student: CifarResNetModel, teacher: CifarResNetModel, layout: torch.memory_format
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the loss as a function of a batch of views."""
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def forward(batch: torch.Tensor) -> torch.Tensor:
        pixel_values = ((batch - mean) / std).contiguous(memory_format=layout)
        with torch.no_grad():
            target = teacher(pixel_values).pooler_output.flatten(1)
        return BETA * coss(student(pixel_values).pooler_output.flatten(1), target)

    return forward


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder written by recipes/convert.py")
    parser.add_argument("--train_parquet", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--student", help="folder with the initial weights; default: those of --seed")
    parser.add_argument("--save_init", help="also write the initial weights to this folder")
    for flag, default in (("--seed", 0), ("--num_images", 500_000), ("--batch_size", 128), ("--threads", 1)):
        parser.add_argument(flag, type=int, default=default)
    for flag in ("--compile", "--channels_last"):
        parser.add_argument(flag, action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    output = Path(args.output)
    if (output / "train_log.json").exists():
        print(f"{output} is finished")
        return
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    student = AutoModel.from_pretrained(args.student) if args.student else initial_student(args.seed)
    if args.save_init:
        save(student, args.save_init)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    student = student.train().to(memory_format=layout)
    teacher = AutoModel.from_pretrained(args.teacher).eval().to(memory_format=layout)
    forward = loss_function(student, teacher, layout)
    if args.compile:
        forward = torch.compile(forward)
    images = decode(args.train_parquet)
    steps = args.num_images // args.batch_size
    run = Run(student, output)
    run.resume()
    run.train(forward, images, steps, args.batch_size, args.seed)
    save(student.to(memory_format=torch.contiguous_format), output)
    steps_per_epoch = len(images) // args.batch_size
    summary = {
        "config": vars(args),
        "steps": steps,
        "images_per_second": steps * args.batch_size / run.progress.seconds,
        "last_epoch_loss_over_beta": float(np.mean(run.progress.losses[-steps_per_epoch:])),
        "log": run.progress.log,
    }
    (output / "train_log.json").write_text(json.dumps(summary, indent=1))
    (output / "resume.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
