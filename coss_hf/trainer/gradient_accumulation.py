"""Exact gradient accumulation, for losses that are statistics of the full batch.

Summing the gradients of micro-batches gives the gradient of the full batch only for a mean over images. Space
similarity is not one: it is computed from sums over the batch, the loss's `totals`. A first pass without gradient
collects the totals of each micro-batch; then each is back-propagated with the totals of the others held fixed. The
gradients add up to exactly that of one batch, for one more forward pass of the student.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def attach_other_totals(model: nn.Module, batches: list[dict], embed_teacher: Callable, reduce: Callable) -> None:
    """Add ``teacher``, the teacher's features, and ``other_totals``, those of the other batches, to each micro-batch.

    Features are added as a dictionary: ``Trainer`` copies batches, and cannot make a named tuple of its parts.

    Args:
        model: ``DistillationModel``, wrapped as for training. Its buffers are left as they were: batch norm counts an
            image once.
        batches: micro-batches of one step, changed in place.
        embed_teacher: a micro-batch to the teacher's features of its views, as far as the loss reads them: those of all
            micro-batches are kept until the step is made.
        reduce: sum of a tensor over processes.
    """
    model.train()
    totals = []
    with _same_buffers_after(model):
        for batch in batches:
            teacher = embed_teacher(batch)
            output = model(batch["pixel_values"], teacher=teacher, index=batch["index"], only_totals=True)
            batch["teacher"] = teacher._asdict()
            totals.append(output["totals"])
    totals = reduce(torch.stack(totals))
    for batch, own in zip(batches, totals, strict=True):
        batch["other_totals"] = totals.sum(0) - own


def scale_gradient(loss: Tensor, factor: int) -> Tensor:
    """Return ``loss`` with ``factor`` times its gradient: Trainer divides both by the number of micro-batches."""
    return loss + (factor - 1) * (loss - loss.detach())


@torch.no_grad()
def check_deterministic_forward(model: nn.Module, size: tuple[int, int]) -> None:
    """Check that two passes of the student are the same.

    Args:
        model: ``Backbone.model`` of the student.
        size: height and width of its input.

    Raises:
        ValueError: dropout or drop path is active.
    """
    first = next(model.parameters())
    training = model.training
    before = _generators(first.device)
    pixels = torch.zeros(2, 3, *size, dtype=first.dtype, device=first.device)
    with _same_buffers_after(model):
        model.train()(pixels)
    drawn = any(not torch.equal(a, b) for a, b in zip(before, _generators(first.device)))
    torch.set_rng_state(before[0])
    model.train(training)
    if drawn:
        config = model.config.to_dict()
        active = [key for key, value in config.items() if "drop" in key and isinstance(value, float) and value]
        remedy = " ".join(f"{key}=0" for key in active) or "those of its configuration that are not 0"
        raise ValueError(
            f"--exact_accumulation passes each image through the student twice, and its dropout or drop path would "
            f"differ: switch it off with --student_config_overrides {remedy}."
        )


@contextlib.contextmanager
def _same_buffers_after(model: nn.Module):
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    for buffer, value in before:
        buffer.copy_(value)


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
