"""The check of every image of a dataset, once: content hashes and images that cannot be decoded."""

import logging
from hashlib import blake2b
from pathlib import Path

import datasets
import numpy as np
import PIL
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from coss_hf.data.decoding import decode, encoded_bytes
from coss_hf.data.processed_images import image_rows

logger = logging.getLogger(__name__)


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
