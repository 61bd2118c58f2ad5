"""Datasets of images: loading, splits, the check of every image, and un-augmented pixels."""

import glob
import json
import logging
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import PIL
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value
from datasets.fingerprint import Hasher

from coss_hf.decoding import decode, encoded_bytes
from coss_hf.disk import room_in_cache
from coss_hf.lookup import find_dataset

logger = logging.getLogger(__name__)

PANEL_SIZE = 2_000  # images held out to watch a training with, by default

IMAGE_NAMES = ("image", "images", "img", "picture", "photo", "jpg", "png")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")
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


def _find_images(dataset: str, rows: Dataset, column: str | None) -> str:
    features, columns = rows.features, f"--dataset {dataset} has the columns {', '.join(rows.column_names)}"
    stored = [key for key, feature in features.items() if _may_hold_images(feature)]
    if column is not None:
        if column not in stored:
            what = "does not hold images" if column in features else "does not exist"
            raise ValueError(f"--image_column {column} {what}; {columns}.")
        return column
    found = [key for key in stored if isinstance(features[key], datasets.Image)]
    # Parquet that `datasets` did not write has no image type: look for its {bytes, path}, then for telling names.
    found = found or [key for key in stored if isinstance(features[key], dict)]
    found = found or [key for key in stored if key.lower() in IMAGE_NAMES]
    if len(found) != 1:
        problem = f"several image columns ({', '.join(found)})" if found else "no image column"
        raise ValueError(f"--image_column: {problem} found, name one; {columns}.")
    return found[0]


def _may_hold_images(feature) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    texts = ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, datasets.Image) or (isinstance(feature, Value) and feature.dtype in texts)


def _find_labels(dataset: str, rows: Dataset, column: str | None) -> str | None:
    numbered = {
        key: isinstance(feature, ClassLabel)
        for key, feature in rows.features.items()
        if isinstance(feature, ClassLabel)
        or (isinstance(feature, Value) and feature.dtype.lstrip("u").startswith("int"))
    }
    labelled = {key: is_class for key, is_class in numbered.items() if _labelled(rows, key)}
    if column is not None:
        if column not in labelled:
            what = "is not a ClassLabel or whole number" if column in rows.features else "does not exist"
            what = "holds only None or -1" if column in numbered else what
            columns = ", ".join(labelled) or "none"
            raise ValueError(f"--label_column {column} {what}; columns of --dataset {dataset} that can be: {columns}.")
        return column
    classes = [key for key, is_class in labelled.items() if is_class]
    named = [key for key in LABEL_NAMES if key in (classes or labelled)]
    return (named + (classes if len(classes) == 1 else []) + [None])[0]


def _labelled(rows: Dataset, column: str) -> bool:
    """Whether any row has a label: sets without labels carry a column of None or -1."""
    values = rows.select_columns(column).with_format("arrow")[:].column(0)
    return bool(len(set(values.unique().to_pylist()) - {None, -1}))


def _check(
    images: Dataset, split: str, column: str, parts: list[np.ndarray], on_bad_image: str, num_proc: int | None
) -> tuple[list[Dataset], list[str]]:
    """Hashes and decodes the rows of all parts; the parts, each in the dataset's order, without the bad rows."""
    images = image_rows(images, column)
    if "image_hash" in images.column_names:
        images = images.remove_columns("image_hash")
    rows = np.sort(np.concatenate(parts))
    todo = images.select_columns(column)
    if len(rows) < len(todo):
        todo = todo.select(rows)
    # What can be decoded depends on Pillow. The default place for the cache would be the user's own folder.
    key = ("checked images, version 1", todo._fingerprint, _file_states(images, column), PIL.__version__)
    fingerprint = Hasher.hash(key)
    store = Path(datasets.config.HF_DATASETS_CACHE, "coss_hf", "checked", f"{fingerprint}.arrow")
    store.parent.mkdir(parents=True, exist_ok=True)
    checked = todo.map(
        _check_batch,
        input_columns=column,
        remove_columns=column,
        batched=True,
        batch_size=32,
        features=Features({"image_hash": Value("uint64"), "problem": Value("string")}),
        num_proc=num_proc,
        cache_file_name=str(store),
        new_fingerprint=fingerprint,
        desc=f"Checking images ({split})",
    ).with_format("arrow")[:]
    hashes = np.zeros(len(images), np.uint64)
    hashes[rows] = checked["image_hash"].to_numpy()
    is_bad = np.zeros(len(images), bool)
    is_bad[rows] = checked["problem"].is_valid().to_numpy()
    bad_rows = np.flatnonzero(is_bad)
    names = [(images[row][column] or {}).get("path") or f"{split} row {row}" for row in bad_rows.tolist()]
    if names:
        listed = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        found = f"{len(names)} of {len(rows)} images of split {split} cannot be decoded: {listed}"
        if on_bad_image == "error":
            problem = checked["problem"].drop_null()[0].as_py()
            raise ValueError(
                f"--on_bad_image error: {found}. The first: {problem}. Repair them, or use --on_bad_image skip."
            )
        logger.warning("Skipping images: %s", found)
    images = images.add_column("image_hash", hashes, feature=Value("uint64"))
    kept = [np.sort(part[~is_bad[part]]) for part in parts]
    for part, good in zip(parts, kept, strict=True):
        if len(part) and not len(good):
            raise ValueError(f"--on_bad_image skip: no image is left of the {len(part)} taken from split {split}.")
    return [images if len(good) == len(images) else images.select(good) for good in kept], names


def _file_states(images: Dataset, column: str) -> list[tuple[int, int] | None]:
    """Size and time of the files of rows without bytes, so that a repaired file is checked again."""
    chunks = images.data.column(column).chunks
    missing = [chunk.filter(chunk.field("bytes").is_null()) for chunk in chunks if chunk.field("bytes").null_count]
    paths = [Path(path or "") for chunk in missing for path in chunk.field("path").to_pylist()]
    return [(path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None for path in paths]


def _check_batch(records: list[dict | None]) -> dict[str, list]:
    """Runs in worker processes: no torch here."""
    hashes, problems = [], []
    for record in records:
        data, problem = b"", None
        try:
            data = encoded_bytes(record)
            decode({"bytes": data, "path": record["path"]})
        except (OSError, ValueError) as error:
            problem = str(error)
        hashes.append(int.from_bytes(blake2b(data, digest_size=8).digest(), "little"))
        problems.append(problem)
    return {"image_hash": np.array(hashes, np.uint64), "problem": problems}


def image_rows(dataset: Dataset, column: str) -> Dataset:
    """The dataset with plain rows and undecoded images."""
    return dataset.with_format(None).cast_column(column, datasets.Image(decode=False))


class ProcessedImages:
    """Un-augmented images for a `DataLoader`: item i is `preprocess([image i])[0]`, a tensor (3, h, w).

    Args:
        dataset: rows as `load_images` returns them.
        image_column: their images.
        preprocess: list of n RGB images -> (n, 3, h, w), such as `Backbone.preprocess`.
    """

    def __init__(self, dataset: Dataset, image_column: str, preprocess: Callable):
        self.rows = image_rows(dataset.select_columns(image_column), image_column)
        self.image_column = image_column
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list:
        return list(self.preprocess([decode(record) for record in self.rows[list(indices)][self.image_column]]))
