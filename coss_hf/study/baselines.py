"""What a student is compared with: baselines at equal images seen, with the same seeds and initial weights."""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from datasets import Dataset

from coss_hf.data.labels import class_numbers
from coss_hf.data.loading import ImageSplits
from coss_hf.evaluation.embeddings import KS, MIN_PROBE, OVERLAP_K
from coss_hf.losses.combination import parse_methods
from coss_hf.losses.registry import LOSSES
from coss_hf.reporting.run_record import write_json
from coss_hf.study.single_run import OF_ONE_RUN, refusal
from coss_hf.study.timing import images_within
from coss_hf.study.trials import StudyConfig, Trial
from coss_hf.trainer.arguments import ModelArguments
from coss_hf.trainer.training_args import DistillationArguments
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

# Arguments that each trial sets for itself.
TRIAL_ARGUMENTS = ("output_dir", "method", "seed", "num_images", "neighbors_k", "beta")
WITHOUT_LABELS = ("overlap10", "cosine")
# Number of training images without which a metric has no value.
TRAIN_IMAGES = {"probe": MIN_PROBE} | {f"knn{k}": k for k in KS}
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
            raise ValueError(refusal(name))


def check_numbers(training: DistillationArguments, hours: float | None, seeds: int, jobs: int) -> None:
    """Check the numbers of a study alone, without images or networks.

    Raises:
        ValueError: what cannot be compared.
    """
    if (hours is None) == (training.num_images is None):
        raise ValueError("--hours or --num_images: give one of them, the length of the comparison.")
    if hours is not None and not 0 < hours < math.inf:
        raise ValueError(f"--hours={hours} must be above 0 and finite: give the hours for everything.")
    if seeds < 3:
        raise ValueError(f"--seeds={seeds} must be at least 3, for intervals that mean something: give 3 or more.")
    if jobs < 1:
        raise ValueError(f"--jobs={jobs} must be at least 1: give the number of runs that train at the same time.")
    if training.seed != DistillationArguments.seed:
        raise ValueError(f"--seed={training.seed}: the runs have the seeds 1 to {seeds}; give --seeds, their number.")


def check_methods(methods: Sequence[str]) -> None:
    """Check the names of methods alone, without images or networks; their options are checked with the networks.

    Raises:
        ValueError: an expression that cannot be read, or an unknown method.
    """
    with errors_about_methods():
        for expression in methods:
            for method in parse_methods(expression):
                if method.name not in LOSSES:
                    raise ValueError(
                        f"--methods={expression!r}: there is no method {method.name!r}; choose one of "
                        f"{', '.join(LOSSES)}, or a sum of them."
                    )


@contextlib.contextmanager
def errors_about_methods() -> Iterator[None]:
    """In the block, errors about ``--method`` name ``--methods``, the option that a study has instead."""
    try:
        yield
    except ValueError as error:
        error.args = tuple(re.sub(r"--method(?=[ =:])", "--methods", str(one)) for one in error.args)
        raise


def measured_split(splits: ImageSplits, held_out_only: bool) -> str:
    """Return the name of the split that a study measures on.

    Args:
        splits: the images.
        held_out_only: whether test images must not be read.

    Raises:
        ValueError: there are no images to measure on.
    """
    if held_out_only and splits.validation is None:
        raise ValueError("--validation_size: hold images out of train, say 2000, to compare the methods on.")
    if splits.test is None and splits.validation is None:
        raise ValueError("--validation_size: there is no test split, so hold images out of train to compare on.")
    return "validation" if held_out_only or splits.test is None else "test"


def check_batch(training: DistillationArguments, train_images: int) -> None:
    """Check that there are enough images for a step of the row without neighbours, which takes as many images.

    Args:
        training: arguments of every run.
        train_images: number of training images.

    Raises:
        ValueError: there are not; found before any neighbour is searched.
    """
    step = training.images_per_step
    k = training.neighbors_k
    if not k or step <= train_images:
        return
    others = ["fewer neighbours", "more images"]
    if most := train_images * training.per_device_train_batch_size // step:
        others.insert(0, f"--per_device_train_batch_size {most} at most")
    batches = training.gradient_accumulation_steps
    accumulated = f" and --gradient_accumulation_steps={batches}" if batches > 1 else ""
    raise ValueError(
        f"--per_device_train_batch_size={training.per_device_train_batch_size} with --neighbors_k={k}{accumulated}: a "
        f'step of the row "{PLAIN}" has as many images as the others, {step}, and no neighbours among them, but there '
        f"are {train_images} training images; give {', '.join(others[:-1])} or {others[-1]}."
    )


def has_labels(splits: ImageSplits, *measured: Dataset) -> bool:
    """Return whether accuracies are defined: each image has a label, and the splits have classes in common.

    Args:
        splits: the images.
        measured: the splits that are measured on.
    """
    column = splits.label_column
    return column is not None and class_numbers(column, splits.train, *measured) is not None


def check_measured(split: str, splits: ImageSplits) -> None:
    """Check that there are enough images to measure on.

    Args:
        split: name of the split that is measured on.
        splits: the images.

    Raises:
        ValueError: too few; without labels each image needs more others than the neighbours that are compared.
    """
    measured = getattr(splits, split)
    count = len(measured)
    labelled = has_labels(splits, measured)
    least = 2 if labelled else OVERLAP_K + 1
    if count < least:
        labels = "with labels" if labelled else "without a label for each"
        option = "--validation_size" if split == "validation" else "--test_split"
        raise ValueError(f"{option}: {count} images to measure on; {labels} a comparison needs {least} or more.")


def check_report(metric: str, splits: ImageSplits, *, chooses: bool) -> None:
    """Check that there are images to report on, with labels if the metric needs them, and enough for it.

    Args:
        metric: metric that chooses and ranks.
        splits: the images.
        chooses: whether it is also measured on held-out images.

    Raises:
        ValueError: the metric would have no value.
    """
    if splits.test is None:
        raise ValueError("--test_split: a table is reported on test images, and there are none; name their split.")
    measured = {"--test_split": splits.test}
    if chooses and splits.validation is not None:
        measured["--validation_size"] = splits.validation
    if metric not in WITHOUT_LABELS and splits.label_column is None:
        raise ValueError(f"--metric={metric} needs labels, and none were found: name --label_column.")
    if metric not in WITHOUT_LABELS and not has_labels(splits, *measured.values()):
        raise ValueError(
            f"--metric={metric} needs a label of each image, and the same classes in all splits, which "
            f"--label_column={splits.label_column} does not have: complete it, or give --metric "
            f"{' or '.join(WITHOUT_LABELS)}."
        )
    least = OVERLAP_K + 1 if metric == "overlap10" else 1
    for option, images in measured.items():
        if len(images) < least:
            raise ValueError(
                f"{option}: --metric={metric} needs {least} images or more to measure on, and there are {len(images)}; "
                f"give more, or another --metric."
            )
    least = TRAIN_IMAGES.get(metric, 1)
    if len(splits.train) < least:
        raise ValueError(
            f"--metric={metric} needs {least} training images or more, and there are {len(splits.train)}; give more, "
            f"or another --metric."
        )


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


def run_images(
    folder: Path, hours: float, trained: list[Trial], others: list[Trial], config: StudyConfig, parallel: int = 1
) -> int:
    """Return the number of images of a run, so that all runs end in time.

    It is measured once and kept in the folder: a second measurement would find other speeds, and make other trials.

    Args:
        folder: folder of the study.
        hours: time for everything.
        trained: trials with training.
        others: trials without training.
        config: what they share.
        parallel: number of trials that run at the same time, each on a device of its own.

    Raises:
        ValueError: not even a few steps of each fit.
    """
    path = folder / "length.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    measured = config.key(replace(trained[0], num_images=0))  # teacher, student, images and arguments
    name = f"{hours:g} h, {measured}" if parallel == 1 else f"{hours:g} h on {parallel} devices, {measured}"
    found = known.get(name)
    if found is None:
        found = {"num_images": images_within(3600 * hours, trained, others, config, parallel), "runs": len(trained)}
        write_json(path, known | {name: found})
    elif found["runs"] != len(trained):
        logger.warning(
            "--hours=%g: the length of a run was measured for %d runs, and stays so that their results are kept; %d "
            "runs take about %.2g h. Remove %s to measure again.",
            *(hours, found["runs"], len(trained), hours * len(trained) / found["runs"], path),
        )
    return found["num_images"]
