"""Length of a run in steps, epochs and images, and the step schedule of the learning rate."""

from typing import NamedTuple

import torch
from transformers import TrainerCallback


class RunLength(NamedTuple):
    """Counts images, neighbours included, exactly: the last step of an epoch may accumulate fewer batches.

    Attributes:
        batches: batches of an epoch, one from each process counted once.
        accumulation: batches of an optimiser step.
        images: images of one batch over all processes.
    """

    batches: int
    accumulation: int
    images: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one pass over the anchors."""
        return -(-self.batches // self.accumulation)

    def images_after(self, steps: int) -> int:
        """Images seen after ``steps`` optimiser steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return (epochs * self.batches + min(rest * self.accumulation, self.batches)) * self.images

    def steps_for(self, images: int) -> int:
        """Optimiser steps that see at most ``images`` images."""
        epochs, rest = divmod(images // self.images, self.batches)
        return epochs * self.steps_per_epoch + rest // self.accumulation


def milestone_schedule(optimizer, drops: list[int], gamma: float, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over ``warmup`` steps, then a constant rate times ``gamma`` from each step in ``drops`` on."""

    def factor(step: int) -> float:
        rising = min(1.0, step / warmup) if warmup else 1.0
        return rising * gamma ** sum(step >= drop for drop in drops)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class EpochCallback(TrainerCallback):
    """What a dataset of views needs of a training.

    It is told the epoch: accelerate's own call reaches it at one process only, and not after a resume. It keeps its
    images, if it can, where they are seen more than once. Persistent loader workers end where the training ends well:
    the garbage collector may take their queues before they are told, and torch then waits 5 seconds for each.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def on_train_begin(self, args, state, control, **kwargs):
        if state.num_train_epochs > 1:
            self.dataset.keep_images()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.dataset.set_epoch(int(state.epoch or 0))

    def on_train_end(self, args, state, control, train_dataloader=None, **kwargs):
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            loader._iterator = None
            iterator._shutdown_workers()
