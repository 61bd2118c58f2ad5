"""A comparison of one pair of networks: CoSS, its baselines and other methods, at equal images seen."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coss_hf.data.loading import MAX_DEFAULT_VALIDATION_SIZE, ImageSplits
from coss_hf.reporting.run_record import command, write_json
from coss_hf.study.baselines import (
    changed_arguments,
    check_batch,
    check_measured,
    check_methods,
    check_numbers,
    check_options,
    errors_about_methods,
    has_labels,
    measured_split,
    run_images,
    trained_trials,
    untrained_trials,
)
from coss_hf.study.sweep import Sweep
from coss_hf.study.trials import OPERATION, StudyConfig, Trial, load, shared_views
from coss_hf.trainer.arguments import DataArguments, ModelArguments
from coss_hf.trainer.inputs import view_size
from coss_hf.trainer.settings import Settings, Situation, fill, find_situation, values_to_record
from coss_hf.trainer.training_args import DistillationArguments

FILLED = "settings.json"  # what a study's arguments left out, by what it was filled by


@dataclass(frozen=True)
class Comparison:
    """Trials that are checked and ready to run.

    Attributes:
        pair: name of student and teacher.
        split: split that is measured on.
        num_images: number of images that each trained trial sees.
        trials: all trials.
        config: what they share.
        sweep: runs them.
        settings: what was filled of that which the arguments of every run left out.
        note: sentence on the training images that networks are measured against, where these are not all of them;
            else empty.
    """

    pair: str
    split: str
    num_images: int
    trials: list[Trial]
    config: StudyConfig
    sweep: Sweep
    settings: Settings
    note: str = ""

    def run(self) -> list[dict]:
        """Run the unfinished trials and return the results of all of them."""
        return self.sweep.run(self.trials, self.config)


def plan_comparison(
    name: str,
    models: ModelArguments,
    data: DataArguments,
    training: DistillationArguments,
    *,
    seeds: int,
    hours: float | None,
    jobs: int,
    methods: Sequence[str] = (),
    held_out_only: bool = False,
) -> Comparison:
    """Check everything and choose the length of the runs; all bad input is found here.

    Args:
        name: name of the file of results in ``training.output_dir``, without its ending.
        models: teacher and student.
        data: the images; without ``validation_size`` as many are held out as ``held_out_size`` says.
        training: arguments of every run.
        seeds: number of runs of each method.
        hours: time for everything, if ``training`` has no ``num_images``.
        jobs: number of trials that run in parallel.
        methods: expressions of other methods.
        held_out_only: measure on held-out images even if there are test images.

    Raises:
        ValueError: what cannot be compared.
    """
    check_options(training)
    check_numbers(training, hours, seeds, jobs)
    check_methods(methods)
    data = replace(data, validation_size=held_out_size(data, unless_test=not held_out_only))
    pair = f"{models.student or models.student_init} / {models.teacher}"
    folder = Path(training.output_dir)
    view_seed = training.seed if training.view_seed is None else training.view_seed
    given = training
    training, settings = fill_for_trials(given, models, data, jobs)
    views = shared_views(training.view_epochs, view_seed, training.teacher_cache, folder)
    config = StudyConfig(data, {pair: models}, changed_arguments(training) | views, logs=folder / "runs").identified()
    splits, _ = load(config, pair)
    split = measured_split(splits, held_out_only)
    check_measured(split, splits)
    check_batch(training, len(splits.train))
    sweep = Sweep(folder, name, jobs, {"command": command()})
    trained = trained_trials(pair, training, seeds, split, methods)
    with errors_about_methods() if methods else contextlib.nullcontext():
        sweep.check(trained, config)
    others = untrained_trials(pair, models, seeds, split)
    parallel = min(jobs, 1 if training.use_cpu else max(1, len(sweep.gpus)))
    num_images = training.num_images or run_images(folder, hours, trained, others, config, parallel)
    trials = [replace(trial, num_images=num_images) for trial in trained] + others
    keep_filled(given, training, settings)
    note = measured_against(config, split, splits)
    return Comparison(pair, split, num_images, trials, config, sweep, settings, note)


def measured_against(config: StudyConfig, split: str, splits: ImageSplits) -> str:
    """Say against how many training images networks are measured, where these are not all of them; else nothing.

    Args:
        config: what the trials share.
        split: split that is measured on.
        splits: the images.
    """
    count = len(splits.train)
    if split != "validation" or count <= config.bank_size or not has_labels(splits, splits.validation):
        return ""
    return (
        f"On held-out images k-NN, the classifiers and retrieval take {config.bank_size:,} of the {count:,} training "
        f"images, on test images all of them: compare figures of this table with each other alone."
    )


def fill_for_trials(
    training: DistillationArguments, models: ModelArguments, data: DataArguments, jobs: int
) -> tuple[DistillationArguments, Settings]:
    """Fill what the arguments of every run leave out, once for all of them: their results are compared.

    It is kept in the folder, so that a study resumes with the same trials on another machine, and after an update.

    Args:
        training: arguments of every run.
        models: teacher and student.
        data: the images.
        jobs: number of trials that run in parallel.
    """
    splits, teacher = load(StudyConfig(data, {"": models}), "")
    student = models.load_student(teacher)
    size = view_size(training, student, teacher)
    situation = find_situation(
        training,
        student,
        teacher,
        size=size,
        images=len(splits.train),
        share_of_cores=jobs,
        length_is_known=True,
    )
    return fill(training, situation, _kept(training).get(_key(training, situation)))


def keep_filled(given: DistillationArguments, filled: DistillationArguments, settings: Settings) -> None:
    """Keep what was filled in the folder of a study, for ``fill_for_trials``.

    Args:
        given: arguments of every run, as they were given.
        filled: the same, filled.
        settings: what was filled.
    """
    if not settings.filled:
        return
    kept = _kept(given)
    key = _key(given, settings.situation)
    if key not in kept:
        write_json(Path(given.output_dir, FILLED), kept | {key: values_to_record(filled)})


def _kept(given: DistillationArguments) -> dict[str, dict]:
    path = Path(given.output_dir, FILLED)
    return json.loads(path.read_text()) if path.exists() else {}


def _key(given: DistillationArguments, situation: Situation) -> str:
    """Of what was given, of the networks and of the images; not of the machine, nor of what changes no result.

    Args:
        given: arguments of every run, as they were given.
        situation: networks and images.
    """
    networks_and_images = [
        situation.family,
        situation.trained,
        situation.size,
        situation.images,
        situation.views,
        situation.parameters,
    ]
    changed = {name: value for name, value in changed_arguments(given).items() if name not in OPERATION}
    text = json.dumps([networks_and_images, changed], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def held_out_size(data: DataArguments, *, unless_test: bool = False) -> int | float:
    """Return how many images to hold out: as many as a training does, if the dataset has no validation images.

    Args:
        data: the images.
        unless_test: hold none out where the dataset has test images.
    """
    if data.validation_size is not None:
        return data.validation_size
    splits = data.load()
    measured = splits.validation is not None or (unless_test and splits.test is not None)
    return 0 if measured else min(MAX_DEFAULT_VALIDATION_SIZE, len(splits.train) // 10)


def ranking_metric(rows: list[dict]) -> str:
    """Return the metric that ranks results: linear evaluation, or without labels the overlap with the teacher's."""
    return "linear" if any(row.get("linear") is not None for row in rows) else "overlap10"
