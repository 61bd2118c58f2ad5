"""What a run will do, before it does it."""

import time

import torch

from coss_hf.data.loading import ImageSplits
from coss_hf.trainer.trainer import DistillationTrainer

PROBE_IMAGES = 16


def describe(trainer: DistillationTrainer, splits: ImageSplits, measure: bool = False) -> str:
    """Return everything that was resolved, one line each.

    Args:
        trainer: not yet started.
        splits: its images.
        measure: also run a few steps on noise for an estimate of memory and time; weights are left as they were.
    """
    args = trainer.args
    steps = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * trainer.length.steps_per_epoch)
    images = trainer.length.images_after(steps)
    size = trainer.train_dataset.size
    head = "none" if trainer.model.head is None else str(trainer.model.head).replace("\n", " ")
    facts = {
        "teacher": repr(trainer.teacher),
        "student": repr(trainer.student),
        "head": head,
        "loss": f"{args.method}: {trainer.model.criterion!r}",
        "images": _images(splits),
        "bad images": _bad_images(splits),
        "views": f"{size}x{size}, augmentation {args.augmentation}",
        "neighbours": _neighbors(trainer),
        "step": f"{args.images_per_step:,} images: {args.per_device_train_batch_size} anchors x {1 + args.neighbors_k} "
        f"views x {args.world_size} processes x {args.gradient_accumulation_steps} accumulated",
        "watched": _evaluation(trainer),
        "length": f"{steps:,} steps, {images:,} images seen",
        "device": f"{args.device}, mixed precision: {trainer.accelerator.mixed_precision}",
    }
    if measure:
        seconds, memory = _measure(trainer, size)
        minutes = images / args.world_size * seconds / 60
        facts["estimate"] = f"{minutes:.1f} minutes without data loading, {memory / 2**30:.2f} GiB a device"
    return "\n".join(f"{name:<12}{value}" for name, value in facts.items() if value)


def _images(splits: ImageSplits) -> str:
    counts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    shown = ", ".join(f"{name} {len(rows):,}" for name, rows in counts.items() if rows is not None)
    return f"{shown}; column {splits.image_column!r}, labels {splits.label_column!r} (evaluation only)"


def _bad_images(splits: ImageSplits) -> str:
    if not splits.bad_images:
        return ""
    return f"{len(splits.bad_images)} left out: {', '.join(splits.bad_images[:5])}"


def _neighbors(trainer: DistillationTrainer) -> str:
    args = trainer.args
    if not args.neighbors_k:
        return "none"
    text = f"{args.neighbors_k} of the nearest {args.neighbors_pool}"
    fewer, none = trainer.train_dataset.short
    if fewer:
        text += f"; {fewer:,} images have fewer (drawn with replacement), {none:,} of them none (views of their own)"
    return text


def _evaluation(trainer: DistillationTrainer) -> str:
    """On how many images the training is evaluated, and how often; or that it is not."""
    args = trainer.args
    if trainer.evaluator is None or args.eval_strategy == "no":
        return "no: without images held out of train (--validation_size) or with --eval_strategy no"
    often = f"every {args.eval_steps:g} steps" if args.eval_strategy == "steps" else "after each epoch"
    return f"on {len(trainer.evaluator.test_images):,} images held out of train, before the first step and {often}"


def _measure(trainer: DistillationTrainer, size: int) -> tuple[float, float]:
    """Seconds an image and bytes a device. On a CPU a few images are timed; a GPU is only busy with a whole batch."""
    args = trainer.args
    model = trainer.model
    batch = args.per_device_train_batch_size * (1 + args.neighbors_k)
    probe = batch if args.device.type == "cuda" else min(batch, PROBE_IMAGES)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {
        "pixel_values": torch.randint(0, 256, (probe, 3, size, size), dtype=torch.uint8, device=args.device),
        "index": torch.arange(probe, device=args.device),
    }
    model.train()
    # Weights, and of what is trained also gradients and momentum.
    held = {p.untyped_storage().data_ptr(): 3 * p.nbytes for p in model.parameters() if p.requires_grad}
    held |= {p.untyped_storage().data_ptr(): p.nbytes for p in trainer.teacher.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    elapsed = []
    for _ in range(3):
        kept.clear()
        start = time.perf_counter()
        with trainer.compute_loss_context_manager(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = trainer.compute_loss(model, inputs)
        loss.backward()
        loss.item()  # waits for the device
        elapsed.append(time.perf_counter() - start)
        activations = sum(kept.values())
    model.zero_grad(set_to_none=True)
    model.load_state_dict(state)
    trainer.monitor.reset()
    return min(elapsed) / probe, sum(held.values()) + activations * batch / probe
