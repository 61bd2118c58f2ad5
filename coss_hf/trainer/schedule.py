"""Length of a run in steps, epochs and images, and the step schedule of the learning rate."""

from typing import NamedTuple

import torch


class RunLength(NamedTuple):
    """Counts images, neighbours included, exactly: the last step of an epoch may accumulate fewer batches.

    Attributes:
        batches: batches of an epoch, one from each process counted once.
        accumulation: batches of an optimizer step.
        images: images of one batch over all processes.
    """

    batches: int
    accumulation: int
    images: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the anchors."""
        return -(-self.batches // self.accumulation)

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step, unless it is the last one of an epoch."""
        return self.accumulation * self.images

    def images_after(self, steps: int) -> int:
        """Images seen after ``steps`` optimizer steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return (epochs * self.batches + min(rest * self.accumulation, self.batches)) * self.images

    def steps_for(self, images: int) -> int:
        """Optimizer steps that see at most ``images`` images."""
        epochs, rest = divmod(images // self.images, self.batches)
        return epochs * self.steps_per_epoch + rest // self.accumulation


def milestone_schedule(optimizer, drops: list[int], gamma: float, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over ``warmup`` steps, then a constant rate times ``gamma`` from each step in ``drops`` on."""

    def factor(step: int) -> float:
        rising = min(1.0, step / warmup) if warmup else 1.0
        return rising * gamma ** sum(step >= drop for drop in drops)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
