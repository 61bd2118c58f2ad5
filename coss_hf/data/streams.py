"""Images read as a stream: opening one, its first images, and what a stream cannot do."""

import glob
import itertools
import os
import zipfile
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, Features, IterableDataset, IterableDatasetDict, Value
from datasets.utils.file_utils import xopen

from coss_hf.data.columns import find_image_column, find_label_column
from coss_hf.data.decoding import content_hash, decode, encoded_bytes
from coss_hf.data.sources import split_of_file
from coss_hf.utils.disk import cache_errors_as_value_error
from coss_hf.utils.errors import UnreadableImage
from coss_hf.utils.hub_lookup import find_dataset
from coss_hf.utils.messages import first_line

SAMPLE = 16  # images that are kept of a stream in any case
HELD_OUT = 2_000  # most images of a stream that is evaluated on
BANK = 2_000  # training images whose labels k-NN votes with
# What `datasets` reads by the shard, by the end of its files' names.
SHARDS = {".parquet": "parquet", ".tar": "webdataset"}
HELD_OUT_SPLITS = ("validation", "valid", "val", "test")


class Stream(NamedTuple):
    """Training images that are read in order, without an index.

    Attributes:
        rows: undecoded images, in one column.
        held_out: content hashes of images that are not trained on, uint64, sorted.
        identity: tells the stream from another one.
    """

    rows: IterableDataset
    held_out: np.ndarray
    identity: str


class StreamParts(NamedTuple):
    """What `load_stream` returns.

    Attributes:
        stream: the training images.
        first: the first training images, in memory, with the column `image_hash`.
        validation: images held out, the same; None without any.
        image_column: the name of the image column.
        label_column: the name of the label column; None without labels.
        bad_images: names of the images that were left out here, since they cannot be decoded.
    """

    stream: Stream
    first: Dataset
    validation: Dataset | None
    image_column: str
    label_column: str | None
    bad_images: list[str]


def open_stream(dataset: str, name: str | None, revision: str | None) -> IterableDatasetDict:
    """Open a dataset on the Hub, or tar or parquet files on this machine, for streaming.

    Args:
        dataset: a Hub name, a folder, a file, or a pattern of files.
        name: the name of the dataset's configuration on the Hub.
        revision: the revision on the Hub.

    Raises:
        ValueError: there is no such dataset, or it is not one of shards.
    """
    path = Path(dataset).expanduser()
    try:
        if path.exists() or glob.has_magic(dataset):
            return _open_files(path)
        find_dataset(dataset, revision)
        return datasets.load_dataset(dataset, name=name, revision=revision, streaming=True)
    except Exception as error:  # `datasets` lets through the errors of every format and file system beneath it
        if isinstance(error, ValueError) and str(error).startswith("--"):
            raise
        raise ValueError(f"--dataset {dataset} cannot be opened as a stream: {first_line(error)}.") from error


def _open_files(path: Path) -> IterableDatasetDict:
    if path.is_dir():
        found = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in SHARDS)
    else:
        found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    kinds = {os.path.splitext(file)[1].lower() for file in found}
    if len(kinds) != 1 or not kinds <= set(SHARDS):
        holds = f"it holds {' and '.join(sorted(kinds))} files" if kinds else "it holds none"
        raise ValueError(
            f"--streaming reads parquet files or tar files (WebDataset), not both; --dataset {path}: {holds}. Give "
            f"files of one kind, or leave --streaming out."
        )
    by_split: dict[str, list[str]] = {}
    for file in found:
        split = split_of_file(os.path.relpath(file, path)) if len(found) > 1 else "train"
        by_split.setdefault(split, []).append(glob.escape(os.path.abspath(file)))
    return datasets.load_dataset(SHARDS[kinds.pop()], data_files=by_split, streaming=True)


@cache_errors_as_value_error()
def load_stream(
    dataset: str | Path | IterableDataset | IterableDatasetDict,
    *,
    name: str | None = None,
    revision: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_size: float | None = None,
    max_train_samples: int | None = None,
    on_bad_image: str = "error",
    evaluated: bool = False,
) -> StreamParts:
    """Open a stream of images, and read its first ones.

    Args:
        dataset: a Hub name, tar or parquet files; or a stream of `datasets`.
        name: see `load_images`.
        revision: see `load_images`.
        train_split: see `load_images`.
        test_split: the split whose first images are held out; by default validation, else test, if there is one.
        image_column: see `load_images`.
        label_column: see `load_images`; labels are searched in the first images.
        validation_size: number of images held out. They are those that the stream begins with, unless there is a split
            for them. None: none of the training stream, 2,000 of such a split.
        max_train_samples: not for streams.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        evaluated: whether more images are held out elsewhere, so that training images are kept to evaluate with.

    Raises:
        ValueError: an invalid argument, or a stream that cannot be trained on.
    """
    if max_train_samples is not None:
        raise ValueError(
            f"--max_train_samples {max_train_samples}: a stream is read in order, and its length is that of the run; "
            f"leave it out, and give --max_steps or --num_images."
        )
    if validation_size is not None and (validation_size < 0 or validation_size % 1):
        raise ValueError(
            f"--validation_size {validation_size}: a stream has no length of which to take a share; give a number of "
            f"images, the first of which are held out."
        )
    if isinstance(dataset, (str, Path)):
        dataset = str(dataset)
        opened = open_stream(dataset, name, revision)
    else:
        opened = dataset
        dataset = "the stream"
    train, other = _choose(dataset, opened, train_split, test_split)
    train = _with_features(train)
    image_column = find_image_column(dataset, train, image_column)
    count = 0 if other is not None else int(validation_size or 0)
    bank = BANK if count or other is not None or evaluated else 0
    first = _First(train, image_column, on_bad_image, "train")
    validation = first.checked(count)
    sample = first.unchecked(max(SAMPLE, bank))
    if not sample:
        raise ValueError(
            f"--validation_size {count}: {dataset} has {len(validation)} images; at least 1 must be left to train on."
        )
    bad_images = first.bad_images
    if other is not None:
        other = _with_features(other)
        find_image_column(f"{dataset} (images held out)", other, image_column)
        first = _First(other, image_column, on_bad_image, "validation")
        validation = first.checked(int(validation_size or HELD_OUT))
        bad_images = bad_images + first.bad_images
    identity = _digest([content_hash(_bytes(row[image_column])) for row in sample[:SAMPLE]], _shuffles(train), train)
    sample = _as_dataset(sample, train.features, image_column)
    label_column = find_label_column(dataset, sample, label_column)
    features = train.features if other is None else other.features
    validation = _as_dataset(validation, features, image_column) if validation else None
    if validation is not None and label_column not in validation.column_names:
        label_column = None
    held_out = np.array([], np.uint64)
    if validation is not None:
        held_out = np.unique(validation.with_format("arrow")[:]["image_hash"].to_numpy())
    rows = undecoded(train, image_column).select_columns(image_column)
    return StreamParts(Stream(rows, held_out, identity), sample, validation, image_column, label_column, bad_images)


def undecoded(rows: IterableDataset, column: str) -> IterableDataset:
    """A stream of plain rows and undecoded images."""
    return rows.with_format(None).cast_column(column, datasets.Image(decode=False))


def _choose(
    dataset: str, opened: IterableDataset | IterableDatasetDict, train_split: str | None, test_split: str | None
) -> tuple[IterableDataset, IterableDataset | None]:
    """The training stream, and the one whose first images are held out."""
    splits = opened if isinstance(opened, dict) else {"train": opened}
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
        test_split = next((split for split in HELD_OUT_SPLITS if split in splits and split != train_split), None)
    if test_split == train_split:
        raise ValueError(
            f"--test_split {test_split}: the same split is trained on; give another, or --validation_size."
        )
    for rows in splits.values():
        if rows._distributed is not None:
            raise ValueError(
                f"--dataset {dataset} was divided by split_dataset_by_node already; give all of it, since the trainer "
                f"divides it."
            )
    return splits[train_split], splits.get(test_split)


def _with_features(rows: IterableDataset) -> IterableDataset:
    """The stream with the types of its columns, read off the first image where it does not know them."""
    if rows.features is not None:
        return rows
    first = next(iter(rows.with_format(None)), None)
    if first is None:
        raise ValueError("--dataset: the stream is empty.")
    return rows.cast(Dataset.from_list([first]).features)


class _First:
    """The images that a stream begins with, each taken once.

    Attributes:
        bad_images: names of those that cannot be decoded, among the checked ones.
    """

    def __init__(self, rows: IterableDataset, column: str, on_bad_image: str, split: str):
        # Labels may be among the texts and numbers; other images are of no use.
        kept = [key for key, feature in rows.features.items() if isinstance(feature, (ClassLabel, Value))]
        self._rows = iter(undecoded(rows, column).select_columns(list(dict.fromkeys([column, *kept]))))
        self._column = column
        self._on_bad_image = on_bad_image
        self._split = split
        self._count = 0
        self.bad_images: list[str] = []

    def checked(self, count: int) -> list[dict]:
        """The next images that can be decoded.

        Raises:
            ValueError: one cannot be decoded, with "error".
        """
        found = []
        while len(found) < count:
            rows = self.unchecked(1)
            if not rows:
                break
            try:
                decode(rows[0][self._column])
                found += rows
            except ValueError as error:
                if self._on_bad_image == "error":
                    raise ValueError(
                        f"--on_bad_image error: {error}. Repair it, or use --on_bad_image skip."
                    ) from error
                name = (rows[0][self._column] or {}).get("path")
                self.bad_images.append(name or f"{self._split} row {self._count - 1}")
        return found

    def unchecked(self, count: int) -> list[dict]:
        """The next images, with their bytes where they do not lie on this machine.

        Raises:
            UnreadableImage: one cannot be downloaded.
        """
        column = self._column
        rows = [row | {column: _downloaded(row[column])} for row in itertools.islice(self._rows, count)]
        self._count += len(rows)
        return rows


def _as_dataset(rows: list[dict], features: Features, column: str) -> Dataset:
    kept = {key: features[key] for key in rows[0] if key != column}
    hashes = np.array([content_hash(_bytes(row[column])) for row in rows], np.uint64)
    table = {key: [row[key] for row in rows] for key in rows[0]}
    dataset = Dataset.from_dict(table, features=Features({column: datasets.Image(decode=False)} | kept))
    return dataset.add_column("image_hash", hashes, feature=Value("uint64"))


def stream_bytes(record: dict | None) -> bytes:
    """The encoded image of a record of a stream, whose path may lie on the Hub or inside an archive.

    Raises:
        UnreadableImage: it cannot be downloaded, which is no fault of the image.
        ValueError: there is no image.
        OSError: its file cannot be read.
    """
    return encoded_bytes(_downloaded(record))


def _downloaded(record: dict | None) -> dict | None:
    """The record, with bytes where its path does not name a file on this machine; none of a damaged archive member."""
    path = (record or {}).get("path") or ""
    if record is None or record["bytes"] is not None or not ("://" in path or "::" in path):
        return record
    try:
        with xopen(path, "rb") as file:
            return record | {"bytes": file.read()}
    except (zipfile.BadZipFile, zlib.error, EOFError):
        return record | {"bytes": b""}  # as a damaged image
    except Exception as error:  # of any file system
        raise UnreadableImage(
            f"{path} cannot be read ({first_line(error)}); give the same command once it can be, with "
            f"--resume_from_checkpoint where a checkpoint was written, or take the image out of the dataset."
        ) from error


def _bytes(record: dict | None) -> bytes:
    try:
        return encoded_bytes(record)
    except (OSError, ValueError):  # a damaged image, which is met again where it is read
        return b""


def _digest(hashes: list[int], shuffles: list[str], rows: IterableDataset) -> str:
    content = repr((hashes, shuffles, rows.num_shards))
    return blake2b(content.encode(), digest_size=8).hexdigest()


def _sources(rows: IterableDataset) -> Iterator[object]:
    """What a stream is made of, from its last step back to its files."""
    todo = [rows._ex_iterable]
    while todo:
        source = todo.pop()
        yield source
        todo += [inner for inner in (getattr(source, "ex_iterable", None),) if inner is not None]
        todo += getattr(source, "ex_iterables", [])


def _shuffles(rows: IterableDataset) -> list[str]:
    """The random states of the shuffles in a stream, which differ where no seed was given."""
    generators = [getattr(source, "generator", None) for source in _sources(rows)]
    return [repr(generator.bit_generator.state) for generator in generators if hasattr(generator, "bit_generator")]


def is_shuffled(rows: IterableDataset) -> bool:
    """Whether a stream draws its order by itself. Its `state_dict` then lacks the images that wait in its buffer."""
    return any(type(source).__name__ == "BufferShuffledExamplesIterable" for source in _sources(rows))
