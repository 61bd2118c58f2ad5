"""What a run will do, before it does it."""

import resource
import time

import torch
from torch import Tensor

from coss_hf.images import ImageSplits
from coss_hf.trainer import DistillationTrainer

PROBE_IMAGES = 16


def describe(trainer: DistillationTrainer, splits: ImageSplits, measure: bool = False) -> str:
    """Everything that was resolved, one line each.

    Args:
        trainer: not yet started.
        splits: its images.
        measure: also run a few steps on noise for an estimate of memory and time; weights are left as they were.
    """
    args, teacher, student = trainer.args, trainer.teacher, trainer.student
    head = trainer.model.head
    size = trainer.train_dataset.size
    steps = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * trainer.steps_per_epoch)
    counts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    lines = [
        f"teacher     {teacher!r}",
        f"student     {student!r}",
        f"head        {'none' if head is None else str(head).replace(chr(10), ' ')}",
        f"loss        {args.method}: {trainer.model.criterion!r}",
        f"images      {', '.join(f'{name} {len(rows):,}' for name, rows in counts.items() if rows is not None)}; "
        f"column {splits.image_column!r}, labels {splits.label_column!r} (evaluation only)",
        f"bad images  {len(splits.bad_images)} left out: {', '.join(splits.bad_images[:5])}" if splits.bad_images else "",
        f"views       {size}x{size}, augmentation {args.augmentation}",
        f"neighbours  {f'{args.neighbors_k} of the nearest {args.neighbors_pool}' if args.neighbors_k else 'none'}",
        f"step        {args.images_per_step:,} images: {args.per_device_train_batch_size} anchors x "
        f"{1 + args.neighbors_k} views x {args.world_size} processes x {args.gradient_accumulation_steps} accumulated",
        f"length      {steps:,} steps, {steps * args.images_per_step:,} images seen",
        f"device      {args.device}, {'bf16' if args.bf16 else 'fp16' if args.fp16 else 'fp32'}",
    ]
    if measure:
        seconds, memory = _measure(trainer, size)
        lines.append(f"estimate    {steps * args.images_per_step * seconds / args.world_size / 60:.1f} minutes without "
                     f"data loading, {memory / 2**30:.1f} GiB a device")
    return "\n".join(line for line in lines if line)


def _measure(trainer: DistillationTrainer, size: int) -> tuple[float, float]:
    """Seconds an image and bytes a device: timed at a few images, scaled to the batch."""
    args, model = trainer.args, trainer.model
    batch = args.per_device_train_batch_size * (1 + args.neighbors_k)
    probe = min(batch, PROBE_IMAGES)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {
        "pixel_values": torch.randint(0, 256, (probe, 3, size, size), dtype=torch.uint8, device=args.device),
        "index": torch.arange(probe, device=args.device),
    }
    model.train()
    weights = sum(p.numel() * p.element_size() for p in trainer.teacher.model.parameters())
    # Weights, gradients and momentum of what is trained.
    weights += sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    before, elapsed = _memory(args.device), []
    for _ in range(3):
        start = time.perf_counter()
        with trainer.compute_loss_context_manager():
            loss: Tensor = trainer.compute_loss(model, inputs)
        loss.backward()
        elapsed.append((loss.item(), time.perf_counter() - start)[1])
    activations = max(_memory(args.device) - before, 0) * batch / probe
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    return min(elapsed) / probe, weights + activations


def _memory(device: torch.device) -> int:
    """Peak bytes so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
