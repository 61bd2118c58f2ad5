"""Running means of a loss's parts, throughput, and the check for losses that are not finite."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from coss_hf.utils.errors import NonFiniteLoss

NAMES_SHOWN = 8


class UncheckedLoss(NamedTuple):
    """A loss of which nobody has yet read whether it is finite.

    Attributes:
        step: number of the optimizer step, from 1.
        loss: scalar, on the device.
        index: ``(b,)`` dataset rows of the images.
        finite: ``(b,)`` whether the features of each image are finite.
    """

    step: int
    loss: Tensor
    index: Tensor
    finite: Tensor


class LossMonitor:
    """Follow the losses of a training without waiting for the device at each step.

    Args:
        image_names: from a list of dataset rows to the names of these images, for error messages.
    """

    def __init__(self, image_names: Callable[[list[int]], list[str]]):
        self._image_names = image_names
        self.reset()

    def reset(self) -> None:
        """Start the running means, the clock and the list of unchecked losses anew."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._unchecked: list[UncheckedLoss] = []
        self.stop_clock()

    # ---- throughput ----

    def start_clock(self, images_seen: int) -> bool:
        """Start the clock of ``images_per_second``, and return True, where it does not run yet."""
        if self._started_at is not None:
            return False
        self._started_at = time.perf_counter()
        self._images_at_start = images_seen
        return True

    def stop_clock(self) -> None:
        """Stop the clock: what follows is not training time."""
        self._started_at: float | None = None
        self._images_at_start = 0

    def seconds(self) -> float | None:
        """Return the time since the clock was started; None where it does not run."""
        return None if self._started_at is None else time.perf_counter() - self._started_at

    def images_per_second(self, images_seen: int) -> float | None:
        """Return the rate since the clock was started, and start it anew; None where it does not run."""
        if self._started_at is None:  # an evaluation came after the last step
            return None
        now = time.perf_counter()
        rate = (images_seen - self._images_at_start) / (now - self._started_at)
        self._started_at = now
        self._images_at_start = images_seen
        return round(rate, 1)

    # ---- running means ----

    def record(self, step: int, loss: Tensor, parts: dict[str, Tensor], index: Tensor, finite: Tensor) -> None:
        """Take note of one forward pass.

        Args:
            step: number of the optimizer step, from 1.
            loss: scalar.
            parts: named scalars, the loss not among them.
            index: ``(b,)`` dataset rows of the images.
            finite: ``(b,)`` whether the features of each image are finite.
        """
        for name, value in parts.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach()
        self._steps += 1
        # Copies: a graph on a GPU writes its output into the same memory at each step.
        self._unchecked.append(UncheckedLoss(step, loss.detach().clone(), index, finite.clone()))
        if loss.device.type == "cpu":
            self.check_finite()

    def has_means(self) -> bool:
        """Whether anything was recorded since the last call of ``means``."""
        return self._steps > 0

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the mean of each part since the last call, over all processes, and start anew.

        Args:
            reduce: mean of a tensor over the processes.
        """
        names = list(self._sums)
        means: dict[str, float] = {}
        if names:  # a loss of one part has none to name
            values = torch.stack([self._sums[name].float() for name in names]) / self._steps
            means = dict(zip(names, reduce(values).tolist(), strict=True))
        self._sums = {}
        self._steps = 0
        return means

    # ---- finite or not ----

    def check_finite(self) -> None:
        """Read the losses that nobody has read yet. On a GPU this waits for them: call it where one logs or saves.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite; the message names the step and the images.
        """
        unchecked = self._unchecked
        self._unchecked = []
        if not unchecked or torch.stack([entry.loss for entry in unchecked]).isfinite().all():
            return
        first = next(entry for entry in unchecked if not entry.loss.isfinite())
        # The loss is that of all micro-batches and processes: only an image's own features say whether it is to blame.
        batches = [entry for entry in unchecked if entry.step == first.step]
        index = torch.cat([entry.index for entry in batches])
        finite = torch.cat([entry.finite for entry in batches])
        blamed = index[~finite].tolist()
        shown = self._image_names((blamed or index.tolist())[:NAMES_SHOWN])
        more = ", ..." if len(blamed or index) > NAMES_SHOWN else ""
        whose = "whose features are not finite" if blamed else "of that step (features of all of them are finite)"
        raise NonFiniteLoss(
            f"The loss is {first.loss.item()} at step {first.step}; nothing was saved after it. Images {whose}: "
            f"{', '.join(shown)}{more}. Lower --learning_rate or --beta, or use float32.",
            found=bool(blamed),
        )
