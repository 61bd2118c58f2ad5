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
from coss_hf.data.rows import image_rows
from coss_hf.data.run_images import BAD, GOOD, NOT_CHECKED, CheckedSplit
from coss_hf.utils.messages import first_names

logger = logging.getLogger(__name__)

MAX_LISTED = 20  # images that a message names


class ImageCheck:
    """Hashes and decodes the images that a run uses.

    Args:
        column: the name of the image column.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        num_proc: number of processes.
        recorded: by split, what the check found when the run that is to be resumed began.

    Attributes:
        bad_images: names of the images left out so far: their path, else their split and row.
        found: by split, what the check found.
    """

    def __init__(
        self, column: str, on_bad_image: str, num_proc: int | None, recorded: dict[str, CheckedSplit] | None = None
    ):
        self.column = column
        self.on_bad_image = on_bad_image
        self.num_proc = num_proc
        self.recorded = recorded or {}
        self.bad_images: list[str] = []
        self.found: dict[str, CheckedSplit] = {}

    def all(self, images: Dataset, split: str) -> Dataset:
        """Check all images of a split; arguments and result as of `parts`."""
        return self.parts(images, split, [np.arange(len(images))])[0]

    def parts(self, images: Dataset, split: str, parts: list[np.ndarray]) -> list[Dataset]:
        """Check the images of all parts of a split.

        Args:
            images: the n rows of the split.
            split: the name of the split.
            parts: row numbers of each part.

        Returns:
            The parts with the column `image_hash`, each in the dataset's order and without bad images.

        Raises:
            ValueError: an image cannot be decoded ("error"), none of a part is left ("skip"), or an image is no longer
                the one that the run began with.
        """
        images = image_rows(images, self.column)
        if "image_hash" in images.column_names:
            images = images.remove_columns("image_hash")
        rows = np.sort(np.concatenate(parts))
        checked = _check_rows(images, rows, split, self.column, self.num_proc)
        problems = checked["problem"].to_pylist()
        found = CheckedSplit(np.zeros(len(images), np.uint64), np.zeros(len(images), np.uint8))
        found.hashes[rows] = checked["image_hash"].to_numpy()
        found.states[rows] = [GOOD if problem is None else BAD for problem in problems]
        recorded = self.recorded.get(split)
        if recorded is not None and len(recorded.states) == len(images):
            self._compare(images, split, found, recorded)
        self.found[split] = found
        bad = rows[found.states[rows] == BAD]
        if len(bad):
            names = self._names(images, split, bad)
            problem = dict(zip(rows.tolist(), problems, strict=True))[int(bad[0])]
            _report_bad_images(names, len(rows), split, self.on_bad_image, problem)
            self.bad_images += names
        images = images.add_column("image_hash", found.hashes, feature=Value("uint64"))
        return [self._good(images, split, part, found.states) for part in parts]

    def _good(self, images: Dataset, split: str, part: np.ndarray, states: np.ndarray) -> Dataset:
        good = np.sort(part[states[part] == GOOD])
        if len(part) and not len(good):
            raise ValueError(f"--on_bad_image skip: no image is left of the {len(part)} taken from split {split}.")
        return images if len(good) == len(images) else images.select(good)

    def _compare(self, images: Dataset, split: str, found: CheckedSplit, recorded: CheckedSplit) -> None:
        """Bring `found` to what was recorded when the run began, so that its rows stay the same."""
        was_good = (recorded.states == GOOD) & (found.states != NOT_CHECKED)
        changed = np.flatnonzero(was_good & (found.states == GOOD) & (found.hashes != recorded.hashes))
        if len(changed):
            raise ValueError(
                f"--resume_from_checkpoint: {len(changed)} images of split {split} are not those that the run began "
                f"with: {first_names(self._names(images, split, changed))}. Put these back, or start afresh in another "
                f"--output_dir."
            )
        lost = np.flatnonzero(was_good & (found.states == BAD))
        if len(lost):
            self._report_lost(split, self._names(images, split, lost))
        found.hashes[lost] = recorded.hashes[lost]
        found.states[lost] = GOOD
        found.states[(recorded.states == BAD) & (found.states == GOOD)] = BAD  # repaired since: still left out

    def _report_lost(self, split: str, names: list[str]) -> None:
        lost = f"{len(names)} images of split {split} can no longer be decoded: {first_names(names, MAX_LISTED)}"
        if self.on_bad_image == "error":
            raise ValueError(
                f"--on_bad_image error: {lost}. Restore the files, or resume with --on_bad_image skip, which takes "
                f"other images in their place."
            )
        logger.warning("--on_bad_image skip: %s; other images take their place.", lost)

    def _names(self, images: Dataset, split: str, rows: np.ndarray) -> list[str]:
        records = images[rows.tolist()][self.column]
        return [(record or {}).get("path") or f"{split} row {row}" for row, record in zip(rows, records, strict=True)]


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


def _report_bad_images(names: list[str], total: int, split: str, on_bad_image: str, problem: str | None) -> None:
    found = f"{len(names)} of {total} images of split {split} cannot be decoded: {first_names(names, MAX_LISTED)}"
    if on_bad_image == "error":
        raise ValueError(
            f"--on_bad_image error: {found}. The first: {problem or 'it is left out, since the run began without it'}. "
            f"Repair them, or use --on_bad_image skip."
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
