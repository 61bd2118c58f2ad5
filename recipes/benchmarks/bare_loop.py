"""The yardstick: CoSS as a plain PyTorch loop, to compare the trainer's speed and results with.

python recipes/benchmarks/bare_loop.py --teacher TEACHER --seed 0 --train_parquet TRAIN.parquet --output OUT

An interrupted run continues from OUT/resume.pt, a finished one is left alone.
"""

import argparse
import io
import json
import math
import os
import time
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

BETA, LAMBDA, LEARNING_RATE = 50.0, 0.5, 0.05
CHECKPOINT_STEPS = 500


def initial_student(seed: int) -> CifarResNetModel:
    """resnet20 with padding shortcuts and the random weights of `seed`."""
    torch.manual_seed(seed)
    return CifarResNetModel(cifar_config("resnet20", shortcut="padding"))


def save(model: CifarResNetModel, folder: str | Path) -> None:
    model.save_pretrained(folder)
    cifar_image_processor(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).save_pretrained(folder)


def decode(parquet: str) -> torch.Tensor:
    """All images of the file, uint8 (n, 3, 32, 32)."""
    records = pyarrow.parquet.read_table(parquet, columns=["image"])["image"].to_pylist()
    images = [np.asarray(Image.open(io.BytesIO(record["bytes"])).convert("RGB")) for record in records]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def views(images: torch.Tensor, corner: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Random crop with a black border of 4 pixels and horizontal flip: `corner` (b, 2) of 0..8, `flip` (b,) of bool."""
    rows = corner[:, 0, None] + torch.arange(32)
    columns = corner[:, 1, None] + torch.arange(32)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    sample = torch.arange(len(images))[:, None, None]
    return F.pad(images, (4, 4, 4, 4))[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def learning_rate(step: int, steps: int) -> float:
    warmup = math.ceil(0.05 * steps)
    if step < warmup:
        return LEARNING_RATE * step / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def coss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Minus the mean cosine over the rows (images), and LAMBDA times that over the columns (dimensions)."""
    rows, columns = (F.cosine_similarity(student, teacher, dim=dim, eps=1e-12).mean() for dim in (1, 0))
    return -rows - LAMBDA * columns


def main(arguments: list[str] | None = None) -> None:
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
    args = parser.parse_args(arguments)
    output = Path(args.output)
    if (output / "train_log.json").exists():
        print(f"{output} is finished")
        return
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)

    student = AutoModel.from_pretrained(args.student) if args.student else initial_student(args.seed)
    if args.save_init:
        save(student, args.save_init)
    teacher = AutoModel.from_pretrained(args.teacher).eval()
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    student, teacher = student.train().to(memory_format=layout), teacher.to(memory_format=layout)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))

    def forward(batch: torch.Tensor) -> torch.Tensor:
        pixel_values = ((batch - mean) / std).contiguous(memory_format=layout)
        with torch.no_grad():
            target = teacher(pixel_values).pooler_output.flatten(1)
        return BETA * coss(student(pixel_values).pooler_output.flatten(1), target)

    if args.compile:
        forward = torch.compile(forward)
    optimizer = torch.optim.SGD(student.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    start, seconds, log, losses = 0, 0.0, [], []
    if (output / "resume.pt").exists():
        state = torch.load(output / "resume.pt")
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, log, losses = state["step"], state["seconds"], state["log"], state["losses"]

    images = decode(args.train_parquet)
    steps, steps_per_epoch = args.num_images // args.batch_size, len(images) // args.batch_size
    clock, epoch = time.perf_counter(), None
    for step in range(start, steps):
        if step // steps_per_epoch != epoch:
            # Order, crops and flips of an epoch depend on nothing but the seed and its number: no state to resume.
            epoch = step // steps_per_epoch
            generator = torch.Generator().manual_seed(1000 * epoch + args.seed)
            order = torch.randperm(len(images), generator=generator)
            corner = torch.randint(9, (len(images), 2), generator=generator)
            flip = torch.rand(len(images), generator=generator) < 0.5
        chosen = order[step % steps_per_epoch * args.batch_size :][: args.batch_size]
        loss = forward(views(images[chosen], corner[chosen], flip[chosen]))
        optimizer.param_groups[0]["lr"] = learning_rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / BETA)
        done = step + 1
        if done % 100 == 0 or done == steps:
            seconds, clock = seconds + time.perf_counter() - clock, time.perf_counter()
            log.append({"step": done, "loss": BETA * float(np.mean(losses[-100:])), "seconds": seconds})
            print(f"step {done}/{steps}  loss/beta {losses[-1]:.4f}  {seconds:.0f} s", flush=True)
        if done % CHECKPOINT_STEPS == 0:
            state = {"step": done, "seconds": seconds, "log": log, "losses": losses}
            state |= {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, output / "resume.tmp")
            os.replace(output / "resume.tmp", output / "resume.pt")

    save(student.to(memory_format=torch.contiguous_format), output)
    summary = {"config": vars(args), "steps": steps, "images_per_second": steps * args.batch_size / seconds}
    summary |= {"last_epoch_loss_over_beta": float(np.mean(losses[-steps_per_epoch:])), "log": log}
    (output / "train_log.json").write_text(json.dumps(summary, indent=1))
    (output / "resume.pt").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
