"""The check of every image of a dataset, once: content hashes and images that cannot be decoded."""

import logging
from hashlib import blake2b
from pathlib import Path

import datasets
import numpy as np
import PIL
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from coss_hf.data.decoding import decode, encoded_bytes
from coss_hf.data.processed_images import image_rows

logger = logging.getLogger(__name__)

MAX_LISTED = 20  # images that a message names


def check_images(
    images: Dataset, split: str, column: str, parts: list[np.ndarray], on_bad_image: str, num_proc: int | None
) -> tuple[list[Dataset], list[str]]:
    """Hash and decode the images of all parts of a split.

    Args:
        images: the n rows of the split.
        split: the name of the split, for messages.
        column: the name of the image column.
        parts: row numbers of each part.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        num_proc: number of processes.

    Returns:
        The parts with the column `image_hash`, each in the dataset's order and without bad images, and the names of
        the bad images: their path, else their split and row.

    Raises:
        ValueError: an image cannot be decoded ("error"), or none of a part is left ("skip").
    """
    images = image_rows(images, column)
    if "image_hash" in images.column_names:
        images = images.remove_columns("image_hash")
    rows = np.sort(np.concatenate(parts))
    checked = _check_rows(images, rows, split, column, num_proc)
    hashes = np.zeros(len(images), np.uint64)
    hashes[rows] = checked["image_hash"].to_numpy()
    is_bad = np.zeros(len(images), bool)
    is_bad[rows] = checked["problem"].is_valid().to_numpy()
    names = [_name(images[row][column], split, row) for row in np.flatnonzero(is_bad).tolist()]
    if names:
        _report_bad_images(names, len(rows), split, on_bad_image, checked["problem"].drop_null()[0].as_py())
    images = images.add_column("image_hash", hashes, feature=Value("uint64"))
    good_parts = []
    for part in parts:
        good = np.sort(part[~is_bad[part]])
        if len(part) and not len(good):
            raise ValueError(f"--on_bad_image skip: no image is left of the {len(part)} taken from split {split}.")
        good_parts.append(images if len(good) == len(images) else images.select(good))
    return good_parts, names


def _check_rows(images: Dataset, rows: np.ndarray, split: str, column: str, num_proc: int | None) -> pa.Table:
    """Columns `image_hash` and `problem` (null for a good image) of the given rows, cached."""
    todo = images.select_columns(column)
    if len(rows) < len(todo):
        todo = todo.select(rows)
    # Whether an image decodes depends on Pillow. The default place for the cache would be the user's own folder.
    key = ("checked images, version 1", todo._fingerprint, _file_states(images, column), PIL.__version__)
    fingerprint = Hasher.hash(key)
    cache_file = Path(datasets.config.HF_DATASETS_CACHE, "coss_hf", "checked", f"{fingerprint}.arrow")
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    checked = todo.map(
        _check_batch,
        input_columns=column,
        remove_columns=column,
        batched=True,
        batch_size=32,
        features=Features({"image_hash": Value("uint64"), "problem": Value("string")}),
        num_proc=num_proc,
        cache_file_name=str(cache_file),
        new_fingerprint=fingerprint,
        desc=f"Checking images ({split})",
    )
    return checked.with_format("arrow")[:]


def _name(record: dict | None, split: str, row: int) -> str:
    return (record or {}).get("path") or f"{split} row {row}"


def _report_bad_images(names: list[str], total: int, split: str, on_bad_image: str, first_problem: str) -> None:
    listed = ", ".join(names[:MAX_LISTED])
    if len(names) > MAX_LISTED:
        listed += f" and {len(names) - MAX_LISTED} more"
    found = f"{len(names)} of {total} images of split {split} cannot be decoded: {listed}"
    if on_bad_image == "error":
        raise ValueError(
            f"--on_bad_image error: {found}. The first: {first_problem}. Repair them, or use --on_bad_image skip."
        )
    logger.warning("Skipping images: %s", found)


def _file_states(images: Dataset, column: str) -> list[tuple[int, int] | None]:
    """Size and time of the files of rows without bytes, so that a repaired file is checked again."""
    chunks = images.data.column(column).chunks
    missing = [chunk.filter(chunk.field("bytes").is_null()) for chunk in chunks if chunk.field("bytes").null_count]
    paths = [Path(path or "") for chunk in missing for path in chunk.field("path").to_pylist()]
    return [_file_state(path) for path in paths]


def _file_state(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check_batch(records: list[dict | None]) -> dict[str, list]:
    """Hash and decode a batch; runs in worker processes, so no torch here."""
    hashes = []
    problems = []
    for record in records:
        data = b""
        problem = None
        try:
            data = encoded_bytes(record)
            decode({"bytes": data, "path": record["path"]})
        except (OSError, ValueError) as error:
            problem = str(error)
        hashes.append(int.from_bytes(blake2b(data, digest_size=8).digest(), "little"))
        problems.append(problem)
    return {"image_hash": np.array(hashes, np.uint64), "problem": problems}
