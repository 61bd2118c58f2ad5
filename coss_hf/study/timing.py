"""How many images a run may see, so that a study ends in time."""

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import TrainerCallback

from coss_hf.study.trials import StudyConfig, Trial, build_trial_trainer, embedding_seconds, run_trial
from coss_hf.utils.errors import NonFiniteLoss
from coss_hf.utils.units import duration

STEPS = 12  # steps that are timed, at most
FIRST = 4  # steps before them, which are slower
SHARE = 0.1  # of the time for everything, that finding the length of the runs may take
SAMPLE = 64  # images whose embedding is timed


class _Clock(TrainerCallback):
    """Notes the time of each step, and ends the training at ``deadline``."""

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # steps are begun before earlier ones are done
        self.times.append(time.perf_counter())
        control.should_training_stop |= self.times[-1] > self.deadline

    def per_step(self, start: float) -> float:
        """Seconds of a later step: without the first ones, where there are enough others."""
        times = [start, *self.times]
        first = min(FIRST, (len(times) - 1) // 2)
        return (times[-1] - times[first]) / (len(times) - 1 - first)


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


def _time_steps(trial: Trial, config: StudyConfig, folder: Path, seconds: float) -> _Speed:
    """Time a few steps of a trial, for about ``seconds``, without checkpoints or trackers; no schedule changes it."""
    deadline = time.perf_counter() + seconds
    training = config.training | {"max_steps": STEPS + FIRST, "save_strategy": "no", "report_to": []}
    timed = replace(config, training=training, milestones=())
    trainer = build_trial_trainer(replace(trial, num_images=None), timed, folder)
    clock = _Clock(deadline)
    trainer.add_callback(clock)
    start = time.perf_counter()  # after the search for neighbours, which all trials share
    try:
        trainer.train()
    except NonFiniteLoss:  # as in its trials, which end there and are rows that say so
        if not clock.times:
            clock.times.append(time.perf_counter())
    return _Speed(
        before=clock.times[0] - start,
        per_step=clock.per_step(start),
        images_per_step=trainer.args.images_per_step,
    )


def _time_measurement(trial: Trial, config: StudyConfig, folder: Path, seconds: float) -> float:
    """Return the seconds in which a network is measured: timed, or estimated where that would take over ``seconds``."""
    estimate = embedding_seconds(trial, config, SAMPLE)
    if estimate > seconds:
        return estimate
    begin = time.perf_counter()
    run_trial(trial, config, folder)
    return time.perf_counter() - begin


def images_within(
    seconds: float, trained: list[Trial], others: list[Trial], config: StudyConfig, parallel: int = 1
) -> int:
    """Return the number of images that each of the ``trained`` trials may see.

    Each method is timed over a few steps, with what it takes before its first; the measurement is timed once, on an
    untrained trial, or estimated by a few images. That takes about a tenth of ``seconds`` at most. How much slower a
    step is while others run on the same machine is not measured: trials that share a device are taken to share the
    speed of one alone, those on devices of their own to have it each.

    Args:
        seconds: time for everything.
        trained: trials with training.
        others: trials without training.
        config: what they share.
        parallel: number of trials that run at the same time, each on a device of its own.

    Raises:
        ValueError: not even a few steps of each fit.
    """
    # The last round may leave devices without a trial.
    parallel = len(trained) / math.ceil(len(trained) / parallel)
    begin = time.perf_counter()
    per_image = 0.0
    least = 0
    groups: dict[tuple[str, int], list[Trial]] = {}
    for trial in trained:
        groups.setdefault((trial.expression, trial.neighbors_k), []).append(trial)
    with tempfile.TemporaryDirectory() as folder:
        measurement = _time_measurement(others[0], config, Path(folder), SHARE * seconds / 2)
        fixed = measurement * (len(trained) + len(others))
        _check_time(seconds, fixed / parallel)
        for number, group in enumerate(groups.values()):
            left = begin + SHARE * seconds - time.perf_counter()
            speed = _time_steps(group[-1], config, Path(folder), left / (len(groups) - number))
            fixed += len(group) * speed.before
            per_image += len(group) * speed.per_step / speed.images_per_step
            least = max(least, 10 * speed.images_per_step)
            _check_time(seconds, (fixed + least * per_image) / parallel)
    spent = time.perf_counter() - begin
    _check_time(seconds, spent + (fixed + least * per_image) / parallel)
    return int(((seconds - spent) * parallel - fixed) / per_image)


def _check_time(seconds: float, needed: float) -> None:
    if needed > seconds:
        raise ValueError(
            f"--hours={seconds / 3600:g} ({duration(seconds)}) is too short for these runs, which need "
            f"{duration(needed)} or more: give {1.05 * needed / 3600:.2g} at least."
        )
