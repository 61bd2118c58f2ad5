"""How many images a run may see, so that a study ends in time."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import TrainerCallback

from coss_hf.study.trials import StudyConfig, Trial, build_trial_trainer, run_trial

STEPS = 12  # steps that are timed
FIRST = 4  # steps before them, which are slower


class _Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # steps are begun before earlier ones are done
        self.times.append(time.perf_counter())


@dataclass
class _Speed:
    """Time of a method.

    Attributes:
        before: seconds before its first step ends.
        per_step: seconds of a later step.
        images_per_step: number of images of a step.
    """

    before: float
    per_step: float
    images_per_step: int


def _time_steps(trial: Trial, config: StudyConfig, folder: Path) -> _Speed:
    """Time a few steps of a trial, without checkpoints; a schedule changes no time."""
    training = config.training | {"max_steps": STEPS + FIRST, "save_strategy": "no"}
    timed = replace(config, training=training, milestones=())
    trainer = build_trial_trainer(replace(trial, num_images=None), timed, folder)
    clock = _Clock()
    trainer.add_callback(clock)
    start = time.perf_counter()  # after the search for neighbours, which all trials share
    trainer.train()
    return _Speed(
        before=clock.times[0] - start,
        per_step=(clock.times[-1] - clock.times[FIRST - 1]) / STEPS,
        images_per_step=trainer.args.images_per_step,
    )


def images_within(seconds: float, trained: list[Trial], others: list[Trial], config: StudyConfig) -> int:
    """Return the number of images that each of the ``trained`` trials may see.

    Each method is timed over a few steps, with what it takes before its first; the measurement is timed once, on an
    untrained trial. How much slower a step is while others run on the same machine is not measured: trials in parallel
    are taken to share the speed of one alone.

    Args:
        seconds: time for everything.
        trained: trials with training.
        others: trials without training.
        config: what they share.

    Raises:
        ValueError: not even a few steps of each fit.
    """
    begin = time.perf_counter()
    per_image = 0.0
    least = 0
    with tempfile.TemporaryDirectory() as folder:
        run_trial(others[0], config, Path(folder))
        fixed = (time.perf_counter() - begin) * (len(trained) + len(others))
        groups: dict[tuple[str, int], list[Trial]] = {}
        for trial in trained:
            groups.setdefault((trial.expression, trial.neighbors_k), []).append(trial)
        for group in groups.values():
            speed = _time_steps(group[-1], config, Path(folder))
            fixed += len(group) * speed.before
            per_image += len(group) * speed.per_step / speed.images_per_step
            least = max(least, 10 * speed.images_per_step)
    fixed += time.perf_counter() - begin
    images = int((seconds - fixed) / per_image)
    if images < least:
        needed = (fixed + least * per_image) / 3600
        raise ValueError(f"--hours={seconds / 3600:g} is too short for these runs: give {needed:.2g} at least.")
    return images
