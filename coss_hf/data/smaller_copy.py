"""A copy of a dataset with smaller images, for repeated runs."""

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import PIL
from datasets import Dataset, DatasetDict, Features, Value
from datasets.fingerprint import Hasher
from filelock import FileLock, Timeout
from PIL import Image

from coss_hf.data.columns import find_image_column
from coss_hf.data.decoding import decode_reduced, encoded_bytes, is_fault_of_image
from coss_hf.data.encoded_files import EncodedFiles
from coss_hf.data.relative_paths import resolve_paths
from coss_hf.data.rows import image_rows
from coss_hf.data.sources import load_source
from coss_hf.utils.disk import cache_errors_as_value_error, full_disk
from coss_hf.utils.messages import first_names

BEFORE = "bytes_before"
STATE = "copy_state"
SAME, SMALLER, BAD = range(3)
PART = 1000  # images: what a call that is stopped loses at most, per process
MAX_JPEG_SIDE = 65_500  # pixels, of libjpeg


class SmallerCopy(NamedTuple):
    """What was copied.

    Attributes:
        images: number of images of the copy.
        smaller: how many of them were made smaller.
        left_out: number of images that could not be decoded.
        bytes_before: of the encoded images.
        bytes_after: of their copies.
    """

    images: int
    smaller: int
    left_out: int
    bytes_before: int
    bytes_after: int


def write_smaller_copy(
    dataset: str,
    output: Path,
    shorter_side: int,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    quality: int = 95,
    on_bad_image: str = "error",
    num_proc: int | None = None,
) -> SmallerCopy:
    """Write a `save_to_disk` folder of all splits, in which the images' shorter side is at most `shorter_side`.

    It is there complete or not at all. A call that was stopped leaves what it has copied, part by part, in the cache of
    `datasets`, where the same call finds it; at the end it is removed.

    Args:
        dataset: see `load_images`.
        output: the folder to write.
        shorter_side: in pixels.
        name: the name of the dataset's configuration.
        revision: the revision on the Hub.
        image_column: the name of the image column; by default found by type, then by name.
        quality: of the copies, as JPEG.
        on_bad_image: `error`, or `skip` to leave out images that cannot be decoded.
        num_proc: number of processes.

    Raises:
        ValueError: an invalid argument, images that cannot be decoded, or a folder that cannot be written.
    """
    if shorter_side < 1 or not 1 <= quality <= 95:
        raise ValueError(f"--shorter_side={shorter_side}, --quality={quality}: give 1 pixel or more, and 1 to 95.")
    if num_proc is not None and num_proc < 1:
        raise ValueError(f"--num_proc={num_proc}: give 1 or more, or leave it out.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output={output} is there already: remove it, or give another folder.")
    with cache_errors_as_value_error():
        splits, column = _splits(dataset, name, revision, image_column)
        parts = _Parts(splits, column, shorter_side, quality, num_proc)
    with parts.owned():
        copies = {}
        counts = []
        for split, rows in splits.items():
            with cache_errors_as_value_error():
                mapped = parts.mapped(split)
            copies[split], found = _copy(rows, mapped, column, split, on_bad_image)
            counts.append(found)
        _save(DatasetDict(copies), output)
        shutil.rmtree(parts.folder, ignore_errors=True)
    return SmallerCopy(*(sum(values) for values in zip(*counts, strict=True)))


def _splits(
    dataset: str, name: str | None, revision: str | None, image_column: str | None
) -> tuple[dict[str, Dataset], str]:
    """Undecoded images of each split, and their column."""
    source = load_source(dataset, name, revision)
    first = source.splits.get("train") or next(iter(source.splits.values()))
    column = find_image_column(dataset, first, image_column)
    found = {}
    for split, rows in source.splits.items():
        if column not in rows.column_names:
            raise ValueError(f"--image_column={column}: split {split} of {dataset} has no such column.")
        found[split] = image_rows(resolve_paths(dataset, rows, column, source.folders), column)
    return found, column


class _Parts:
    """Copies of images in files of a part each, in the cache of `datasets`: a call that was stopped finds them again.

    They are on disk even where the rows are in memory, as those of a folder of images are.

    Attributes:
        folder: of the files; another one once an image file was replaced.
    """

    def __init__(self, splits: dict[str, Dataset], column: str, side: int, quality: int, num_proc: int | None):
        self._splits = splits
        self._options = {"column": column, "side": side, "quality": quality}
        self._num_proc = num_proc
        known = []
        for split, rows in splits.items():
            files = EncodedFiles(rows, column)
            known.append((split, rows._fingerprint, files.names, files.sizes.tolist(), files.times.tolist()))
        name = Hasher.hash(("smaller copy, version 1", PIL.__version__, known, self._options))
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "coss_hf_smaller_copies" / name

    @contextlib.contextmanager
    def owned(self):
        """Keep other calls away that copy the same images."""
        with cache_errors_as_value_error():
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                "--dataset: another call is copying these images at this size; wait until it has ended."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def mapped(self, split: str) -> Dataset:
        """All rows of a split with smaller images, with what was done to each."""
        rows = self._splits[split]
        features = Features({**rows.features, BEFORE: Value("int64"), STATE: Value("int8")})
        if not len(rows):  # which `map` returns as they are
            return Dataset.from_dict({name: [] for name in features}, features=features)
        size = PART * (self._num_proc or 1)
        found = []
        for start in range(0, len(rows), size):
            end = min(start + size, len(rows))
            part = rows.select(range(start, end)).map(
                _smaller_row,
                fn_kwargs=self._options,
                features=features,
                num_proc=self._num_proc,
                load_from_cache_file=True,
                cache_file_name=str(self.folder / f"{split}-{start}-{end}.arrow"),
                # That of `datasets` would be of the paths alone: what is cached for a copy of other images at the same
                # paths, such as their hashes, would be taken for this one's.
                new_fingerprint=Hasher.hash((self.folder.name, split, start, end)),
                desc=f"Copying images ({split}, {start:,} to {end:,} of {len(rows):,})",
                writer_batch_size=100,
            )
            if BAD in part[STATE][:]:
                # Their fault may be one of the disk, or be mended: the next call looks again. They stay mapped.
                for file in part.cache_files:
                    with contextlib.suppress(OSError):
                        os.remove(file["filename"])
            found.append(part)
        return datasets.concatenate_datasets(found)


def _copy(rows: Dataset, mapped: Dataset, column: str, split: str, on_bad_image: str) -> tuple[Dataset, SmallerCopy]:
    """Leave out, or refuse, what could not be decoded, and count."""
    states = np.asarray(mapped[STATE][:])
    bad = np.flatnonzero(states == BAD)
    if len(bad) and (on_bad_image == "error" or len(bad) == len(rows)):
        records = rows[bad[:20].tolist()][column]
        names = [(record or {}).get("path") or f"row {row} of {split}" for row, record in zip(bad, records)]
        raise ValueError(
            f"--dataset: {len(bad)} images of split {split} cannot be decoded ({first_names(names)}). Leave them "
            f"out with --on_bad_image skip, which takes what has been copied, or remove or repair them: then all "
            f"images are copied again."
        )
    before = int(np.sum(np.asarray(mapped[BEFORE][:])[states != BAD]))
    if len(bad):
        mapped = mapped.select(np.flatnonzero(states != BAD))
    kept = mapped.remove_columns([BEFORE, STATE])
    after = sum(len(record["bytes"]) for batch in kept.select_columns(column).iter(100) for record in batch[column])
    kept = kept.cast_column(column, datasets.Image())
    return kept, SmallerCopy(len(kept), int((states == SMALLER).sum()), len(bad), before, after)


def _smaller_row(row: dict, column: str, side: int, quality: int) -> dict:
    record = row[column]
    try:
        data = encoded_bytes(record)
        copy = smaller_image({"bytes": data, "path": record["path"]}, side, quality)
    except (ValueError, OSError) as error:
        if not is_fault_of_image(error):
            raise
        return {column: {"bytes": b"", "path": None}, BEFORE: 0, STATE: BAD}
    path = record["path"] and os.path.basename(record["path"])
    return {
        column: {"bytes": data if copy is None else copy, "path": path},
        BEFORE: len(data),
        STATE: SAME if copy is None else SMALLER,
    }


def smaller_image(record: dict, side: int, quality: int) -> bytes | None:
    """The image with a shorter side of `side` pixels, upright, as JPEG.

    None where it is kept as it is: its shorter side is not longer, or the copy would be longer than a JPEG can be.

    Args:
        record: a row's image `{"bytes", "path"}`.
        side: in pixels.
        quality: of the JPEG.

    Raises:
        ValueError: it cannot be decoded.
    """
    image, size, _ = decode_reduced(record, lambda size: min(size) / side)
    if min(size) <= side:
        return None
    factor = side / min(size)
    smaller = [max(side, round(factor * length)) for length in size]
    if max(smaller) > MAX_JPEG_SIDE:
        return None
    image = image.resize(smaller, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _save(copies: DatasetDict, output: Path) -> None:
    """Write the folder under another name first."""
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        copies.save_to_disk(unfinished)
        if output.exists():
            output.rmdir()  # empty
        os.replace(unfinished, output)
    except Exception as error:  # `datasets` raises many on a full disk
        if not isinstance(error, OSError) and full_disk(error) is None:
            raise
        raise ValueError(
            f"--output={output} cannot be written ({full_disk(error) or error}); free space, or give another folder. "
            f"The same command then continues with what it has copied."
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
