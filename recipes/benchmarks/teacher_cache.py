"""Measure what a teacher cache gives: live, cold and warm training, and a bare loop that trains the student alone.

    python recipes/benchmarks/teacher_cache.py --output teacher_cache.jsonl \
        --resnet_images path/to/cifar10 --vit_images path/to/imagenette --workers 1

Two pairs at random weights: resnet56 -> resnet20 (32 pixels, batch 128) and DINOv2-S/14 with registers -> resnet18 (112
pixels, batch 32). `tensors`: views in memory, which cost nothing to make. `images`: the given images, augmented in
loader processes; small ones are decoded once before, as in each training of several epochs. Modes:

    live     the teacher embeds each view
    cold     the same, and each embedding is written to a cache
    warm     each embedding is read from a cache that is complete
    student  a bare PyTorch loop on tensors in memory, with embeddings in memory: the limit

Rounds run all modes one after another, so that each meets the machine in the same state; each line of the file is one
run. The same command resumes where it stopped. At the end the medians over rounds are printed.
"""

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from result_lines import add_line, read_lines
from torch import nn
from trainer_step import IMAGENET, InMemory, machine, now, restart_with_kept_memory
from transformers import (
    BitImageProcessor,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    TimmWrapperConfig,
    TimmWrapperModel,
    TrainerCallback,
    set_seed,
)

from coss_hf.data.loading import ImageSplits, load_images
from coss_hf.models.backbone import Backbone
from coss_hf.models.cifar.modeling_cifar_resnet import CifarResNetModel
from coss_hf.models.cifar.registry import cifar_config, cifar_image_processor
from coss_hf.models.heads import projection_head
from coss_hf.trainer.callbacks.console import ConsoleCallback
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import command_line

MODES = ("live", "cold", "warm", "student")
PAIRS = {"resnet": ("cifar", 32, 128), "vit": ("imagenet", 112, 32)}  # augmentation, pixels, batch
FIRST = 5  # steps of a run that are not timed
BATCHES_IN_MEMORY = 8


def networks(pair: str) -> tuple[Backbone, Backbone]:
    """Return teacher and student at random weights, the same at each call."""
    set_seed(0)
    if pair == "resnet":
        processor = cifar_image_processor(*IMAGENET)
        teacher, student = (CifarResNetModel(cifar_config(name)) for name in ("resnet56", "resnet20"))
    else:
        size = {"height": 112, "width": 112}
        processor = BitImageProcessor(size={"shortest_edge": 112}, crop_size=size)
        config = Dinov2WithRegistersConfig(
            hidden_size=384, num_attention_heads=6, patch_size=14, image_size=112, num_register_tokens=4
        )
        teacher = Dinov2WithRegistersModel(config)
        student = TimmWrapperModel(TimmWrapperConfig(architecture="resnet18"))
    return Backbone(teacher, processor).freeze(), Backbone(student, processor)


class Clock(TrainerCallback):
    """Notes the time of each step, and the shares that are logged."""

    def __init__(self):
        self.times = []
        self.shares = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(now())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "teacher_share" in logs and state.global_step > FIRST:
            self.shares.append((logs["teacher_share"], logs["data_wait_share"]))


def run_trainer(pair: str, images: ImageSplits | None, cache: Path | None, steps: int, workers: int) -> dict:
    """Train for some steps, and return images per second and shares of the time.

    Args:
        pair: of networks.
        images: to make views of; None for views in memory.
        cache: folder of the teacher's embeddings; None to embed each view.
        steps: timed.
        workers: processes that make views.
    """
    augmentation, size, batch = PAIRS[pair]
    teacher, student = networks(pair)
    set_seed(0)
    with tempfile.TemporaryDirectory() as output:
        args = DistillationArguments(
            output,
            settings="paper",
            seed=0,
            augmentation=augmentation,
            view_size=size,
            view_epochs=1,
            teacher_cache=None if cache is None else str(cache),
            per_device_train_batch_size=batch,
            max_steps=steps + FIRST,
            logging_steps=min(FIRST, steps),
            dataloader_num_workers=0 if images is None else workers,
            dataloader_persistent_workers=images is not None and workers > 0,
            eval_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        data = InMemory(batch * (steps + FIRST), size, view_epochs=1) if images is None else images
        trainer = DistillationTrainer(teacher, student, args, data, callbacks=[clock := Clock()])
        trainer.remove_callback(ConsoleCallback)
        if images is not None:
            trainer.train_dataset.keep_images()
        trainer.train()
    seconds = clock.times[-1] - clock.times[FIRST - 1]
    teacher_share, data_wait = (statistics.fmean(values) for values in zip(*clock.shares, strict=True))
    return {
        "images_per_second": round(batch * steps / seconds, 1),
        "teacher_share": round(teacher_share, 3),
        "data_wait_share": round(data_wait, 3),
    }


def run_student(pair: str, steps: int) -> dict:
    """Train the student alone in a bare loop, towards embeddings in memory."""
    _, size, batch = PAIRS[pair]
    teacher, student = networks(pair)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head = projection_head("auto", student.dim, teacher.dim) or nn.Identity()
    model = student.model.to(device).train()
    head.to(device)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], 0.05, momentum=0.9, weight_decay=5e-4)
    count = batch * BATCHES_IN_MEMORY
    views = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
    embeddings = torch.randn(count, teacher.dim, device=device)
    mean, std = (255 * torch.tensor(values, device=device).view(1, 3, 1, 1) for values in IMAGENET)
    times = []
    for _ in range(steps + FIRST):
        rows = torch.randint(count, (batch,), device=device)
        pixels = (views[rows].float() - mean) / std
        s = head(model(pixel_values=pixels).pooler_output.flatten(1))
        cosines = [nn.functional.cosine_similarity(s, embeddings[rows], dim=dim).mean() for dim in (0, 1)]
        loss = -50 * sum(cosines)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(now())
    seconds = times[-1] - times[FIRST - 1]
    return {"images_per_second": round(batch * steps / seconds, 1), "teacher_share": 0.0, "data_wait_share": 0.0}


def missing_runs(output: Path, datasets: dict[str, list[str]], rounds: int) -> Iterator[dict]:
    """Yield the runs that the file does not hold yet, round by round; each round begins with another mode."""
    done = {tuple(line["run"].values()) for line in read_lines(output)}
    for number in range(rounds):
        for pair, kinds in datasets.items():
            for kind in kinds:
                for mode in MODES[number % len(MODES) :] + MODES[: number % len(MODES)]:
                    run = {"pair": pair, "data": kind, "mode": mode, "round": number}
                    if tuple(run.values()) not in done:
                        yield run


def summary(output: Path) -> str:
    """Return medians of images per second, and how they stand to the live rate and to that of the student alone."""
    rates: dict[tuple[str, str], dict[str, list[float]]] = {}
    shares: dict[tuple[str, str, str], list[float]] = {}
    for line in read_lines(output):
        pair, kind, mode, _ = line["run"].values()
        rates.setdefault((pair, kind), {}).setdefault(mode, []).append(line["images_per_second"])
        shares.setdefault((pair, kind, mode), []).append(line["teacher_share"])
    lines = ["pair    data     mode     images/s   of live  of student  teacher"]
    for (pair, kind), modes in rates.items():
        medians = {mode: statistics.median(values) for mode, values in modes.items()}
        for mode in filter(medians.get, MODES):
            stands = [
                f"{medians[mode] / medians[other]:.2f}" if other in medians else "-" for other in ("live", "student")
            ]
            share = f"{100 * statistics.median(shares[pair, kind, mode]):.0f} %"
            lines.append(f"{pair:<8}{kind:<9}{mode:<9}{medians[mode]:>8.1f}{stands[0]:>10}{stands[1]:>12}{share:>9}")
    return "\n".join(lines)


@command_line()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--resnet_images", help="images of 32 pixels; default: tensors alone")
    parser.add_argument("--vit_images", help="photographs; default: tensors alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a run")
    parser.add_argument("--workers", type=int, default=1, help="loader processes for images")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's default")
    options = parser.parse_args()
    restart_with_kept_memory()
    if options.threads:
        torch.set_num_threads(options.threads)
    folders = {"resnet": options.resnet_images, "vit": options.vit_images}
    kinds = {pair: ["tensors", *(["images"] if folders[pair] else [])] for pair in options.pairs}
    with tempfile.TemporaryDirectory() as folder:
        caches = Path(folder)
        splits: dict[str, ImageSplits] = {}
        for run in missing_runs(options.output, kinds, options.rounds):
            pair, kind, mode, _ = run.values()
            if kind == "images" and pair not in splits:
                found = load_images(folders[pair])
                needed = PAIRS[pair][2] * (options.steps + FIRST)
                splits[pair] = found._replace(train=found.train.select(range(min(needed, len(found.train)))))
            images = splits[pair] if kind == "images" else None
            if mode == "student":
                found = run_student(pair, options.steps)
            else:
                cache = None if mode == "live" else caches / f"{pair}-{kind}-{mode}"
                if mode == "cold":
                    shutil.rmtree(cache, ignore_errors=True)
                elif mode == "warm" and not cache.exists():
                    run_trainer(pair, images, cache, options.steps, options.workers)
                found = run_trainer(pair, images, cache, options.steps, options.workers)
            line = {"run": run, **found, "machine": machine(), "workers": options.workers}
            add_line(options.output, line)
            print(line, flush=True)
    print(summary(options.output))


if __name__ == "__main__":
    main()
