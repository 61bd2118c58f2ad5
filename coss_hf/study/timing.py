"""How many images a run may see, so that a study ends in time."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerCallback

from coss_hf.study.trials import Cell, Setting, prepare, run_cell

STEPS, FIRST = 12, 4  # steps timed, and those before that are slower


class _Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # steps are begun before earlier ones are done
        self.times.append(time.perf_counter())


def images_within(seconds: float, trained: list[Cell], others: list[Cell], setting: Setting) -> int:
    """Images that each of the ``trained`` cells may see.

    Each method is timed over a few steps, and what it takes before its first; the measurement once, on an untrained
    cell; what a step costs beside others on the same machine is not measured: side by side they are taken to share what
    one alone has.

    Args:
        seconds: for everything.
        trained, others: cells with and without training.

    Raises:
        ValueError: not even a few steps of each fit.
    """
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_cell(others[0], setting, Path(folder))
        fixed = (time.perf_counter() - begin) * (len(trained) + len(others))
        per_image, least = 0.0, 0
        for cell in {(cell.expression, cell.neighbors_k): cell for cell in trained}.values():
            clock = _Clock()
            trainer = prepare(replace(cell, num_images=None), setting, Path(folder), [clock])
            trainer.args.max_steps = STEPS + FIRST
            trainer.args.save_strategy = "no"
            start = time.perf_counter()  # neighbours are searched once for all cells
            trainer.train()
            spent = (clock.times[-1] - clock.times[FIRST - 1]) / STEPS
            same = sum((one.expression, one.neighbors_k) == (cell.expression, cell.neighbors_k) for one in trained)
            fixed += same * (clock.times[0] - start)
            per_image += same * spent / trainer.args.images_per_step
            least = max(least, 10 * trainer.args.images_per_step)
    fixed += time.perf_counter() - begin
    images = int((seconds - fixed) / per_image)
    if images < least:
        needed = (fixed + least * per_image) / 3600
        raise ValueError(f"--hours={seconds / 3600:g} is too short for these runs: give {needed:.2g} at least.")
    return images
