"""Datasets of images: loading, choice of splits, and images held out of train."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict

from coss_hf.data.checking import SAMPLE, ImageCheck
from coss_hf.data.columns import find_image_column, find_label_column, has_labels
from coss_hf.data.relative_paths import resolve_paths
from coss_hf.data.run_images import RunImages
from coss_hf.data.sources import Source, load_source
from coss_hf.data.streams import Stream
from coss_hf.utils.disk import cache_errors_as_value_error
from coss_hf.utils.messages import get_logger, parameter_names

logger = get_logger(__name__)

MAX_DEFAULT_VALIDATION_SIZE = 2_000  # images held out of train where no number is given

TEST_NAMES = ("test", "validation", "valid", "val")


class ImageSplits(NamedTuple):
    """What `load_images` returns.

    Attributes:
        train: training images; of a stream the first ones, which it also trains on.
        validation: images that are not trained on, for choices; None where there are none.
        test: test images; None where there are none.
        image_column: name of the image column.
        label_column: name of the label column; None without labels.
        bad_images: names of the images left out: their path, else their split and row.
        on_bad_image: "error" or "skip": what to do where an image can no longer be decoded later.
        run_images: what a run needs to resume with these images, whatever becomes of their files.
        stream: the training images where they are read as a stream.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    image_column: str
    label_column: str | None
    bad_images: list[str]
    on_bad_image: str = "error"
    run_images: RunImages | None = None
    stream: Stream | None = None


@cache_errors_as_value_error()
@parameter_names(dataset_revision="revision", dataset_name="name")
def load_images(
    dataset: str | Path | Dataset | DatasetDict,
    *,
    name: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_size: float | None = 0,
    max_train_samples: int | None = None,
    seed: int = 0,
    on_bad_image: str = "error",
    num_proc: int | None = None,
    recorded: RunImages | None = None,
    by_content: bool = True,
    sample: int = SAMPLE,
) -> ImageSplits:
    """Load a dataset, cut its splits, then hash and decode each of their images once (cached).

    Args:
        dataset: a Hub name, a folder of images (see `load_image_folder`), a parquet file, glob or folder, or a
            `save_to_disk` folder; or a `Dataset` (the split train) or `DatasetDict` in memory.
        name: the name of the dataset's configuration.
        revision: the revision on the Hub.
        train_split: the name of the training split; by default "train", or the only split.
        test_split: the name of the test split; by default the first that exists of test, validation, valid, val.
        image_column: the name of the image column; by default found by type, then by name.
        label_column: the name of the label column; by default found by type, then by name. Labels are optional.
        validation_size: images drawn from train before anything else: a number (1 or more) or a fraction (below 1). 0:
            none, but a split `validation` next to `test` is used where there is one. None: that split, else 2,000
            images, a tenth of train at most, but none of a small set (below 200) or one that brings its neighbours.
        max_train_samples: number of training images drawn from the remaining ones and kept in the dataset's order; a
            smaller subset is part of a larger one.
        seed: the seed of these two draws.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        num_proc: number of processes of the check; None for one a processor, where there are many images.
        recorded: the images of the run that is to be resumed. Images that can no longer be decoded then keep their
            rows ("skip": others take their place), and images that came into a folder since are left out.
        by_content: whether to read each image before anything else, which neighbours and comparisons of splits need.
            False: nothing but a sample is read; of "skip" also what is evaluated on.
        sample: number of images of this sample, of each split.

    Returns:
        Splits whose images are undecoded (`datasets.Image(decode=False)`, read them with `decode`), each with a column
        `image_hash`: uint64, BLAKE2b of the encoded bytes. One that the dataset already had is computed anew. Without
        `by_content` the column is `image_file_hash`, of the name and size of each file.

    Raises:
        ValueError: an invalid argument; the message names the argument, its value and the remedy.
    """
    _check_arguments(validation_size, max_train_samples, on_bad_image)
    if isinstance(dataset, (Dataset, DatasetDict)):
        source = Source(dict(dataset) if isinstance(dataset, DatasetDict) else {"train": dataset}, [])
        dataset = "in memory"
    else:
        source = load_source(str(dataset), name, revision)
    splits = source.splits
    if recorded is not None and source.image_folder is not None and recorded.root == source.image_folder:
        splits = recorded.splits_then(splits)
    listed = splits if source.image_folder is not None else {}
    train_split, test_split = _choose_splits(dataset, splits, train_split, test_split)
    image_column = find_image_column(dataset, splits[train_split], image_column)
    label_column = find_label_column(dataset, splits[train_split], label_column)
    splits = {
        split: resolve_paths(dataset, rows, image_column, source.folders) if image_column in rows.column_names else rows
        for split, rows in splits.items()
    }
    train = splits[train_split]
    test = splits.get(test_split)
    if test is not None:
        find_image_column(f"{dataset} (split {test_split})", test, image_column)
        if label_column and not (label_column in test.column_names and has_labels(test, label_column)):
            logger.warning("Split %s has no labels in %s: labels are ignored.", test_split, label_column)
            label_column = None

    others = (split for split in TEST_NAMES if split in splits and split not in (train_split, test_split))
    validation_split = next(others, None)
    if validation_size is None:
        validation_size = _default_validation_size(train, validation_split)
    held_out = _count_held_out(validation_size, len(train), train_split)
    order = np.random.default_rng(seed).permutation(len(train))
    parts = [order[held_out:][:max_train_samples], order[:held_out]]
    check = ImageCheck(
        image_column,
        on_bad_image,
        num_proc,
        recorded,
        by_content=by_content or (recorded is not None and recorded.by_content),
        sample=sample,
    )
    columns = set(train.column_names)
    train, validation = check.parts(train, train_split, parts, evaluated=parts[1])
    if not held_out:
        validation = None
    if test is not None:
        test = check.all(test, test_split)
    # A set that brings its own validation images next to a test split need not give up training images.
    if validation is None and validation_split is not None and set(splits[validation_split].column_names) == columns:
        validation = check.all(splits[validation_split], validation_split)
    run_images = recorded or RunImages(source.image_folder, listed, check.found)
    return ImageSplits(train, validation, test, image_column, label_column, check.bad_images, on_bad_image, run_images)


def _check_arguments(validation_size: float | None, max_train_samples: int | None, on_bad_image: str) -> None:
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"--on_bad_image {on_bad_image}: choose error or skip.")
    size = 0 if validation_size is None else validation_size
    if not size >= 0 or (size >= 1 and size % 1):
        raise ValueError(f"--validation_size {validation_size}: give a number of images, or a fraction below 1.")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"--max_train_samples {max_train_samples}: give 1 or more, or leave it out for all images.")


def _default_validation_size(train: Dataset, validation_split: str | None) -> int:
    n = len(train)
    if validation_split is not None or "neighbors" in train.column_names or n < 200:
        return 0
    return min(MAX_DEFAULT_VALIDATION_SIZE, n // 10)


def _count_held_out(validation_size: float, n: int, train_split: str) -> int:
    """Number of the n training images to hold out."""
    held_out = int(validation_size) if validation_size >= 1 else round(validation_size * n)
    if held_out >= n or (validation_size and not held_out):
        raise ValueError(
            f"--validation_size {validation_size}: {held_out} of the {n} images of split {train_split}; "
            f"at least 1 must be held out and at least 1 left (0: none held out)."
        )
    return held_out


def _choose_splits(
    dataset: str, splits: dict[str, Dataset], train_split: str | None, test_split: str | None
) -> tuple[str, str | None]:
    for flag, split in (("--train_split", train_split), ("--test_split", test_split)):
        if split is not None and split not in splits:
            raise ValueError(f"{flag} {split}: --dataset {dataset} has only the splits {', '.join(splits)}.")
    if train_split is None:
        train_split = _default_train_split(dataset, splits)
    if test_split is None:
        found = (split for split in TEST_NAMES if split in splits and split != train_split and len(splits[split]))
        test_split = next(found, None)
    if test_split == train_split:
        raise ValueError(
            f"--test_split {test_split}: the same split is trained on; give another, or --validation_size."
        )
    for flag, split in (("--train_split", train_split), ("--test_split", test_split)):
        if split is not None and len(splits[split]) == 0:
            sizes = ", ".join(f"{key} ({len(value)})" for key, value in splits.items())
            raise ValueError(f"{flag} {split}: the split is empty; --dataset {dataset} has {sizes}.")
    return train_split, test_split


def _default_train_split(dataset: str, splits: dict[str, Dataset]) -> str:
    if "train" in splits:
        return "train"
    if len(splits) > 1:
        raise ValueError(f"--train_split: --dataset {dataset} has no split train; choose one of {', '.join(splits)}.")
    return next(iter(splits))
