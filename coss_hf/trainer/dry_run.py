"""What a run will do, before it does it."""

import math
import time

import torch
from torch import nn

from coss_hf.data.loading import ImageSplits
from coss_hf.losses.registry import summands
from coss_hf.models.backbone import evaluating
from coss_hf.trainer.cached_teacher import cache_folder
from coss_hf.trainer.inputs import DRY_RUN_SAMPLE
from coss_hf.trainer.trainer import DistillationTrainer
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.memory import peak_resident_bytes
from coss_hf.utils.units import duration, size_in_bytes

PROBE_IMAGES = 16


def describe(trainer: DistillationTrainer, measure: bool = False) -> str:
    """Return everything that was resolved, one line each.

    Args:
        trainer: not yet started.
        measure: also run a few steps on noise for an estimate of memory and time; weights are left as they were.
    """
    args = trainer.args
    steps = args.max_steps if args.max_steps > 0 else round(args.num_train_epochs * trainer.length.steps_per_epoch)
    images = trainer.length.images_after(steps)
    size = trainer.train_dataset.size
    facts = {
        "teacher": repr(trainer.teacher),
        "student": repr(trainer.student),
        "head": _head(trainer.model.head),
        "loss": f"{trainer.method}: {' + '.join(map(repr, summands(trainer.model.criterion)))}",
        "images": _images(trainer.splits),
        "bad images": _bad_images(trainer.splits, args.dry_run),
        "views": f"{size}x{size}, augmentation {trainer.train_dataset.augmentation_name}",
        "neighbours": _neighbors(trainer),
        "cache": _cache(trainer),
        "step": _step(args),
        "evaluation": _evaluation(trainer, steps),
        "length": f"{steps:,} steps, {images:,} images seen",
        "device": f"{args.device}, mixed precision: {trainer.accelerator.mixed_precision}",
    }
    if measure:
        seconds, memory = _measure(trainer, size)
        where = "of the device" if args.device.type == "cuda" else "per process, its loader workers not counted"
        time_needed = duration(images / args.world_size * seconds)
        facts["estimate"] = f"{time_needed} without data loading, {memory / 2**30:.2f} GiB of memory {where}"
    lines = [f"{name:<12}{value}" for name, value in facts.items() if value]
    if trainer.settings.filled:
        lines.append(trainer.settings.table())
        trainer.settings.shown = True
    return "\n".join(lines)


def _step(args: DistillationArguments) -> str:
    processes = f"{args.world_size} process{'' if args.world_size == 1 else 'es'}"
    return (
        f"{args.images_per_step:,} images: {args.per_device_train_batch_size} anchors x {1 + args.neighbors_k} views x "
        f"{processes} x {args.gradient_accumulation_steps} accumulated"
    )


def _images(splits: ImageSplits | None) -> str:
    if splits is None:
        return "those of the views that were given"
    counts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    numbers = {name: f"{len(rows):,}" for name, rows in counts.items() if rows is not None}
    if splits.stream is not None:
        numbers["train"] = f"a stream of {splits.stream.rows.num_shards} shards"
    shown = ", ".join(f"{name} {number}" for name, number in numbers.items())
    labels = f"labels {splits.label_column!r} (evaluation only)" if splits.label_column else "without labels"
    return f"{shown}; column {splits.image_column!r}, {labels}"


def _head(head: nn.Module | None) -> str:
    layers = [layer for layer in (head.modules() if head is not None else ()) if isinstance(layer, nn.Linear)]
    if not layers:
        return "none" if head is None else repr(head).replace("\n", " ")
    numbers = [layers[0].in_features, *(layer.out_features for layer in layers)]
    return f"{'linear' if len(layers) == 1 else 'mlp'}, {' -> '.join(f'{number:,}' for number in numbers)} numbers"


def _bad_images(splits: ImageSplits | None, dry_run: bool) -> str:
    if splits is None:
        return ""
    if not splits.bad_images:
        return f"none among those that were decoded, {DRY_RUN_SAMPLE} of each split at most" if dry_run else ""
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


def _cache(trainer: DistillationTrainer) -> str:
    """Size of the teacher's embeddings that would be kept; what of them is there depends on neighbours, too."""
    args = trainer.args
    if not args.teacher_cache:
        return ""
    views = trainer.train_dataset
    count = views.view_epochs * len(views) * (1 + views.k)
    size = count * (trainer.teacher.dim * (2 if args.teacher_cache_dtype == "float16" else 4) + 8)
    return (
        f"{cache_folder(args.teacher_cache)}: {size_in_bytes(size)} for {count:,} views, {views.view_epochs:,} epochs, "
        f"{args.teacher_cache_dtype}"
    )


def _evaluation(trainer: DistillationTrainer, steps: int) -> str:
    """On how many images the training is evaluated, and how often; or that it is not."""
    args = trainer.args
    if trainer.evaluator is None:
        return "none during training: no images are held out (--validation_size)"
    if args.eval_strategy == "no":
        return "none during training: --eval_strategy no"
    often = "and after each epoch"
    if args.eval_strategy == "steps":
        interval = args.eval_steps if args.eval_steps >= 1 else math.ceil(args.eval_steps * steps)
        often = f"and every {round(interval):,} steps" if interval <= steps else "alone"
    return f"on {len(trainer.evaluator.test_images):,} images, before the first step {often}"


def _measure(trainer: DistillationTrainer, size: int) -> tuple[float, float]:
    """Seconds per image, and bytes at the peak: on a GPU of a full batch, on a CPU extrapolated from small ones."""
    args = trainer.args
    batch = args.per_device_train_batch_size * (1 + args.neighbors_k)
    buffers = [(buffer, buffer.clone()) for buffer in trainer.model.buffers()]
    if args.gradient_checkpointing:
        _recompute_activations(trainer)
    if args.device.type == "cuda":
        seconds, memory = _on_gpu(trainer, size, batch)
    else:
        seconds, memory = _extrapolate(trainer, size, batch)
        memory += _optimizer_bytes(trainer)
    trainer.model.zero_grad(set_to_none=True)
    for buffer, value in buffers:
        buffer.copy_(value)
    trainer.monitor.reset()
    return seconds, memory


def _recompute_activations(trainer: DistillationTrainer) -> None:
    """As `Trainer` does when it trains, in whose newer releases it has another name and more options."""
    options = dict(trainer.args.gradient_checkpointing_kwargs or {})
    if hasattr(trainer.model.network, "activation_checkpointing_enable"):
        more = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options or None, **more)
    else:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)


def _on_gpu(trainer: DistillationTrainer, size: int, batch: int) -> tuple[float, float]:
    """Seconds per image and bytes at the peak, of a training step or of a batch of the evaluation."""
    device = trainer.args.device
    torch.cuda.reset_peak_memory_stats(device)
    seconds = _time_step(trainer, size, batch) / batch
    memory = torch.cuda.max_memory_allocated(device) + _optimizer_bytes(trainer)
    if count := _evaluated_at_once(trainer):
        trainer.model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats(device)
        _embed(trainer, count)
        memory = max(memory, torch.cuda.max_memory_allocated(device) + _optimizer_bytes(trainer))
    return seconds, memory


def _evaluated_at_once(trainer: DistillationTrainer) -> int:
    """Number of images in a forward pass of the evaluations during the training; 0 without any."""
    if trainer.evaluator is None or trainer.args.eval_strategy == "no":
        return 0
    return min(trainer.args.per_device_eval_batch_size, len(trainer.evaluator.test_images))


def _extrapolate(trainer: DistillationTrainer, size: int, batch: int) -> tuple[float, float]:
    """Seconds per image and bytes at the peak of this process, of training steps and of evaluation."""
    probes = sorted({min(batch, PROBE_IMAGES), min(batch, 2 * PROBE_IMAGES)})
    seconds = _time_step(trainer, size, probes[0])  # the first takes memory that is kept, whatever the batch
    peaks = [peak_resident_bytes(lambda count=count: _time_step(trainer, size, count)) for count in probes]
    seconds = _time_step(trainer, size, probes[-1]) / probes[-1]
    peak = _line(probes, peaks, batch)
    if count := _evaluated_at_once(trainer):
        probes = sorted({min(count, PROBE_IMAGES), min(count, 2 * PROBE_IMAGES)})
        peaks = [peak_resident_bytes(lambda count=count: _embed(trainer, count)) for count in probes]
        peak = max(peak, _line(probes, peaks, count))
    return seconds, peak


def _line(counts: list[int], values: list[int], at: int) -> float:
    """The value at ``at`` of the line through two measurements, or the one there is."""
    slope = max(0.0, (values[-1] - values[0]) / (counts[-1] - counts[0])) if len(counts) > 1 else 0.0
    return values[-1] + slope * (at - counts[-1])


def _time_step(trainer: DistillationTrainer, size: int, count: int) -> float:
    """Seconds of a step on ``count`` views of noise, without the optimizer's part; the faster of two."""
    device = trainer.args.device
    inputs = {
        "pixel_values": torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device),
        "index": torch.arange(count, device=device),
    }
    trainer.model.train()
    elapsed = []
    for _ in range(2):
        start = time.perf_counter()
        # In training the forward pass is put under autocast where the network is prepared.
        with trainer.accelerator.autocast(), trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        loss.item()  # waits for the device
        elapsed.append(time.perf_counter() - start)
    return min(elapsed)


@torch.no_grad()
def _embed(trainer: DistillationTrainer, count: int) -> None:
    """Both networks in turn on ``count`` processed images of noise, as in evaluation."""
    for backbone in (trainer.teacher, trainer.student):
        first = next(backbone.model.parameters())
        with evaluating(backbone.model):
            backbone.features(torch.rand(count, 3, *backbone.size, device=first.device, dtype=first.dtype))


def _optimizer_bytes(trainer: DistillationTrainer) -> int:
    """What the optimizer keeps for each weight: one number in SGD with momentum, two in Adam and most others."""
    args = trainer.args
    trained = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
    if args.optim == "sgd":
        return trained if args.momentum else 0
    return 0 if args.optim == "adafactor" else 2 * trained
