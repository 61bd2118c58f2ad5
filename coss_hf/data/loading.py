"""Datasets of images: loading, splits, the check of every image, and un-augmented pixels."""

import glob
import json
import logging
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import Dataset, DatasetInfo

from coss_hf.data.checking import _check
from coss_hf.data.columns import _find_images, _find_labels, _labelled
from coss_hf.utils.disk import room_in_cache
from coss_hf.utils.hub_lookup import find_dataset

logger = logging.getLogger(__name__)

PANEL_SIZE = 2_000  # images held out to watch a training with, by default

TEST_NAMES = ("test", "validation", "valid", "val")
# Words in file names, as `datasets` reads them.
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test"}
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


class ImageSplits(NamedTuple):
    """What `load_images` returns. `bad_images` names those left out: by path, else by split and row."""

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    image_column: str
    label_column: str | None
    bad_images: list[str]


@room_in_cache()
def load_images(
    dataset: str,
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
) -> ImageSplits:
    """Loads a dataset, cuts its splits, then hashes and decodes every image of them once (cached).

    Args:
        dataset: a Hub name, an image folder, a parquet file, glob or folder, or a `save_to_disk` folder.
        name, revision: configuration and revision on the Hub.
        train_split: "train" by default, or the only split.
        test_split: by default the first there is of test, validation, valid, val.
        image_column, label_column: found by type, then by name. Labels are optional.
        validation_size: images drawn from train before anything else, a number (1 or more) or a share (below 1);
            with 0 a split `validation` beside `test` is used where there is one; None: that split, else 2,000 images,
            a tenth of train at most, but none of a small set (below 200) or one that brings its neighbours.
        max_train_samples: a random subset of the rest, in the dataset's order; a smaller one is part of a larger one.
        seed: of these two draws.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        num_proc: processes of the check; None once faiss or torch have computed in this process (they may hang).

    Returns:
        Splits whose images are undecoded (`datasets.Image(decode=False)`, read them with `decode`), each with a column
        `image_hash`: uint64, BLAKE2b of the encoded bytes. One that the dataset already had is computed anew.

    Raises:
        ValueError: naming the flag, its value and the remedy.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"--on_bad_image {on_bad_image}: choose error or skip.")
    asked = 0 if validation_size is None else validation_size
    if not asked >= 0 or (asked >= 1 and asked % 1):
        raise ValueError(f"--validation_size {validation_size}: give a whole number of images, or a share below 1.")
    if max_train_samples is not None and max_train_samples < 1:
        raise ValueError(f"--max_train_samples {max_train_samples}: give 1 or more, or leave it out for all images.")

    splits = _load_splits(dataset, name, revision)
    train_split, test_split = _choose_splits(dataset, splits, train_split, test_split)
    train, test = splits[train_split], splits.get(test_split)
    image_column = _find_images(dataset, train, image_column)
    label_column = _find_labels(dataset, train, label_column)
    if test is not None:
        _find_images(f"{dataset} (split {test_split})", test, image_column)
        if label_column and not (label_column in test.column_names and _labelled(test, label_column)):
            logger.warning("Split %s has no labels in %s: going on without them.", test_split, label_column)
            label_column = None

    n = len(train)
    own = next((key for key in TEST_NAMES if key in splits and key not in (train_split, test_split)), None)
    if validation_size is None:
        fixed = own is not None or "neighbors" in train.column_names or n < 200
        validation_size = 0 if fixed else min(PANEL_SIZE, n // 10)
    held_out = int(validation_size) if validation_size >= 1 else round(validation_size * n)
    if held_out >= n or (validation_size and not held_out):
        raise ValueError(
            f"--validation_size {validation_size}: {held_out} of the {n} images of split {train_split}; "
            f"at least 1 must be held out and at least 1 left (0: none held out)."
        )
    order = np.random.default_rng(seed).permutation(n)
    parts = [order[held_out:][:max_train_samples], order[:held_out]]
    (train, validation), bad_images = _check(train, train_split, image_column, parts, on_bad_image, num_proc)
    validation = validation if held_out else None
    if test is not None:
        (test,), bad = _check(test, test_split, image_column, [np.arange(len(test))], on_bad_image, num_proc)
        bad_images = bad_images + bad
    # A set that brings its own validation images beside a test split need not give up training images.
    if validation is None and own is not None and splits[own].column_names == splits[train_split].column_names:
        every = [np.arange(len(splits[own]))]
        (validation,), bad = _check(splits[own], own, image_column, every, on_bad_image, num_proc)
        bad_images = bad_images + bad
    return ImageSplits(train, validation, test, image_column, label_column, bad_images)


def _load_splits(dataset: str, name: str | None, revision: str | None) -> dict[str, Dataset]:
    path = Path(dataset).expanduser()
    on_disk = path.exists() or any(character in dataset for character in "*?[")
    if not on_disk:
        find_dataset(dataset, revision)
    try:
        if (path / "dataset_dict.json").is_file():
            names = json.loads((path / "dataset_dict.json").read_text())["splits"]
            return {split: _load_saved(path / split) for split in names}
        if (path / "state.json").is_file():
            return {"train": _load_saved(path)}
        if path.is_dir() or not on_disk:
            return dict(datasets.load_dataset(str(path) if on_disk else dataset, name=name, revision=revision))
        files = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
        if not files or not all(file.endswith(".parquet") for file in files):
            raise ValueError(f"{files[0]} is not a parquet file" if files else "no file matches")
        by_split = {}
        for file in files:
            words = "".join(c if c.isalpha() else " " for c in Path(file).stem.lower()).split()
            split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "train")
            by_split.setdefault(split if len(files) > 1 else "train", []).append(file)
        return dict(datasets.load_dataset("parquet", data_files=by_split))
    except Exception as error:  # `datasets` lets through the errors of every format and file system beneath it
        reason = str(error.__cause__ or error)
        if "corresponds to no data" in reason or "BatchSize must be greater than 0" in reason:
            reason = f"a split is empty ({reason})"
        raise ValueError(
            f"--dataset {dataset} cannot be loaded: {reason}. Give a Hub name (and its "
            f"--dataset_name where it has several), a folder of images, parquet files, or a save_to_disk folder."
        ) from error


def _load_saved(folder: Path) -> Dataset:
    if json.loads((folder / "state.json").read_text())["_data_files"]:
        return datasets.load_from_disk(str(folder))
    features = DatasetInfo.from_directory(str(folder)).features  # load_from_disk fails on a split without rows
    return Dataset.from_dict({key: [] for key in features}, features=features)


def _choose_splits(dataset, splits, train_split, test_split) -> tuple[str, str | None]:
    for flag, split in (("--train_split", train_split), ("--test_split", test_split)):
        if split is not None and split not in splits:
            raise ValueError(f"{flag} {split}: --dataset {dataset} has only the splits {', '.join(splits)}.")
    if train_split is None:
        if "train" not in splits and len(splits) > 1:
            raise ValueError(
                f"--train_split: --dataset {dataset} has no split train; choose one of {', '.join(splits)}."
            )
        train_split = "train" if "train" in splits else next(iter(splits))
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
