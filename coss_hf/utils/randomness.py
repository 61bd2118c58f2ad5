"""The global random state of a training, as a function of its seed and its step alone; and that of a view."""

import contextlib
import random
import struct
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np
import torch
from transformers import set_seed


class StepSeed:
    """Set the global random state before each forward pass of a training.

    Dropout, drop path and losses that sample draw from the global generators. Set anew for each pass, these do not
    depend on what drew from them in between: a search for neighbours, an evaluation, a checkpoint, a data loader. All
    processes of a run get the same state, as they do from ``set_seed``: each of them can draw what one process would
    draw for the batches of all, and take its part of it.

    Args:
        seed: of the run.
        device: where the process computes; its generator is set besides those of Python, NumPy and the CPU.

    Example:
        >>> seed = StepSeed(3, torch.device("cpu"))
        >>> seed.restart()
        >>> seed.apply(step=5)
        >>> first = torch.rand(2)
        >>> _ = torch.rand(100)
        >>> seed.restart()
        >>> seed.apply(step=5)
        >>> torch.equal(torch.rand(2), first)
        True
    """

    def __init__(self, seed: int, device: torch.device):
        self._seed = seed
        self._device = device
        self._step: int | None = None
        self._micro_batch = 0

    def restart(self) -> None:
        """Set the state that a training starts from; the order of its images follows from it, too."""
        set_seed(self._seed)
        self._step = None

    def apply(self, step: int) -> None:
        """Set the state of the next forward pass.

        Args:
            step: number of optimizer steps so far. Passes with the same number are the micro-batches of one step.
        """
        self._micro_batch = self._micro_batch + 1 if step == self._step else 0
        self._step = step
        # A hash, so that neighbouring steps start unrelated streams; 32 bits are all that the CPU's generators take.
        packed = struct.pack("<3q", self._seed, step, self._micro_batch)
        key = int.from_bytes(blake2b(packed, digest_size=4).digest(), "little")
        seed_generators(key)
        if self._device.type != "cpu":
            torch.get_device_module(self._device).manual_seed(key)


def seed_generators(key: int) -> None:
    """Seed the global generators of Python, NumPy and the CPU, from which a transform may draw.

    Args:
        key: 32 bits, all that NumPy's and torch's generators take.
    """
    random.seed(key)
    np.random.seed(key)
    # Not torch.manual_seed, which would reseed the accelerators' generators as well.
    torch.default_generator.manual_seed(key)


@contextlib.contextmanager
def keeping_generators() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and the CPU after the block.

    Example:
        >>> random.seed(1)
        >>> expected = random.random()
        >>> random.seed(1)
        >>> with keeping_generators():
        ...     seed_generators(7)
        >>> random.random() == expected
        True
    """
    of_python = random.getstate()
    of_numpy = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
