"""What a student is compared with: baselines at equal images seen, with the same seeds and initial weights."""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from coss_hf.data.loading import ImageSplits
from coss_hf.evaluation.embeddings import OVERLAP_K
from coss_hf.reporting.run_record import write_json
from coss_hf.study.timing import images_within
from coss_hf.study.trials import StudyConfig, Trial
from coss_hf.trainer.arguments import ModelArguments
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

# Arguments that each trial sets for itself.
TRIAL_ARGUMENTS = ("output_dir", "method", "seed", "num_images", "neighbors_k", "beta")
# A study has its own length, measures in the end, and resumes by itself.
OF_ONE_RUN = (
    "dry_run",
    "push_to_hub",
    "max_steps",
    "num_train_epochs",
    "eval_strategy",
    "resume_from_checkpoint",
    "overwrite_output_dir",
)
WITHOUT_LABELS = ("overlap10", "cosine")
COSINE = "coss, cosine only"
PLAIN = "coss, no neighbours"


def trained_trials(
    pair: str, training: DistillationArguments, seeds: int, split: str, methods: Sequence[str] = ()
) -> list[Trial]:
    """Return trials of CoSS, of its parts and of other methods, each with every seed.

    Without neighbours a step takes as many images as with them.

    Args:
        pair: name of teacher and student.
        training: arguments of every run.
        seeds: number of seeds: 1, 2, ...
        split: split that is measured on.
        methods: expressions of other methods, as of ``--method``.
    """
    k = training.neighbors_k

    def trials(name: str, expression: str, neighbors_k: int = k, anchors: int | None = None) -> list[Trial]:
        return [
            Trial(
                pair=pair,
                method=name,
                expression=expression,
                scale=1,
                seed=seed,
                num_images=training.num_images,
                split=split,
                neighbors_k=neighbors_k,
                anchors=anchors,
            )
            for seed in range(1, seeds + 1)
        ]

    found = trials(COSINE, "coss(lambda_ss=0)") + trials("coss", "coss")
    if k:
        anchors = training.per_device_train_batch_size * (1 + k)
        found += trials(PLAIN, "coss", neighbors_k=0, anchors=anchors)
    for method in dict.fromkeys(methods):
        if method != "coss":
            found += trials(method, method)
    return found


def untrained_trials(pair: str, models: ModelArguments, seeds: int, split: str) -> list[Trial]:
    """Return trials of random weights, of those that the student starts from if it has any, and of the teacher.

    Args:
        pair: name of teacher and student.
        models: teacher and student.
        seeds: number of draws of random weights.
        split: split that is measured on.
    """
    trials = [untrained_trial(pair, "random", seed, split) for seed in range(1, seeds + 1)]
    if models.student_init != "random":
        trials.append(untrained_trial(pair, "initial", 1, split))
    trials.append(untrained_trial(pair, "teacher", 1, split))
    return trials


def untrained_trial(pair: str, method: str, seed: int, split: str) -> Trial:
    """Return the trial of a network that no method trains; see ``UNTRAINED``."""
    return Trial(pair=pair, method=method, expression="", scale=0, seed=seed, num_images=0, split=split)


def check_options(training: DistillationArguments) -> None:
    """Refuse what the help leaves out, as given: before the settings are filled.

    Raises:
        ValueError: an option of a single run.
    """
    for name in OF_ONE_RUN:
        if name in training.given:  # not by its value: --settings paper has epochs of its own
            raise ValueError(f"--{name}: it is for a single run, and this command makes many; leave it out.")


def check_study(
    training: DistillationArguments, hours: float | None, seeds: int, jobs: int, splits: ImageSplits
) -> str:
    """Return the name of the split that is measured on.

    Raises:
        ValueError: what cannot be compared.
    """
    if (hours is None) == (training.num_images is None):
        raise ValueError("--hours or --num_images: give one of them, the length of the comparison.")
    if hours is not None and hours <= 0:
        raise ValueError(f"--hours={hours} must be above 0.")
    if seeds < 3 or jobs < 1:
        raise ValueError(
            f"--seeds={seeds} must be at least 3, for intervals that mean something, and --jobs={jobs} at least 1."
        )
    if training.seed != DistillationArguments.seed:
        raise ValueError(f"--seed={training.seed}: the runs have the seeds 1 to {seeds}; give --seeds, their number.")
    if splits.test is None and splits.validation is None:
        raise ValueError("--validation_size: there is no test split, so hold images out of train to compare on.")
    return "test" if splits.test is not None else "validation"


def check_measured(split: str, splits: ImageSplits) -> None:
    """Check that there are enough images to measure on.

    Args:
        split: name of the split that is measured on.
        splits: the images.

    Raises:
        ValueError: too few; without labels each image needs more others than the neighbours that are compared.
    """
    count = len(getattr(splits, split))
    least = OVERLAP_K + 1 if splits.label_column is None else 2
    if count < least:
        labels = "without labels" if splits.label_column is None else "with labels"
        option = "--validation_size" if split == "validation" else "--test_split"
        raise ValueError(f"{option}: {count} images to measure on; {labels} a comparison needs {least} or more.")


def check_report(metric: str, splits: ImageSplits) -> None:
    """Check that there are images to report on, with labels if the metric needs them.

    Raises:
        ValueError: there are none.
    """
    if splits.test is None:
        raise ValueError("--test_split: a table is reported on test images, and there are none; name their split.")
    if splits.label_column is None and metric not in WITHOUT_LABELS:
        raise ValueError(f"--metric={metric} needs labels, and none were found: name --label_column.")


def changed_arguments(training: DistillationArguments) -> dict:
    """Return the arguments of every run that differ from their defaults, and ``use_cpu``.

    With ``--settings paper`` the defaults are those of the paper, as in studies of before there were others.
    """
    defaults = DistillationArguments(use_cpu=training.use_cpu, settings=training.settings)
    changed = {} if training.settings == DistillationArguments.settings else {"settings": training.settings}
    for argument in fields(training):
        value = getattr(training, argument.name) if argument.init else None
        if argument.init and argument.name not in TRIAL_ARGUMENTS and value != getattr(defaults, argument.name):
            changed[argument.name] = value
    changed["use_cpu"] = training.use_cpu
    return changed


def run_images(folder: Path, hours: float, trained: list[Trial], others: list[Trial], config: StudyConfig) -> int:
    """Return the number of images of a run, so that all runs end in time.

    It is measured once and kept in the folder: a second measurement would find other speeds, and make other trials.

    Args:
        folder: folder of the study.
        hours: time for everything.
        trained: trials with training.
        others: trials without training.
        config: what they share.

    Raises:
        ValueError: not even a few steps of each fit.
    """
    path = folder / "length.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if known.get("hours") == hours:  # of before it was known what was measured
        return known["num_images"]
    measured = config.key(replace(trained[0], num_images=0))  # teacher, student, images and arguments
    found = known.get(name := f"{hours:g} h, {measured}")
    if found is None:
        found = {"num_images": images_within(3600 * hours, trained, others, config), "runs": len(trained)}
        write_json(path, known | {name: found})
    elif found["runs"] != len(trained):
        logger.warning(
            "--hours=%g: the length of a run was measured for %d runs, and stays so that their results are kept; %d "
            "runs take about %.2g h. Remove %s to measure again.",
            *(hours, found["runs"], len(trained), hours * len(trained) / found["runs"], path),
        )
    return found["num_images"]
