"""What is found out about images before a run: content hashes, and images that cannot be decoded."""

import json
import os
import tempfile
from hashlib import blake2b
from pathlib import Path

import datasets
import numpy as np
import PIL
from datasets import Dataset, Features, Value

from coss_hf.data.decoding import content_hash, decode, encoded_bytes, is_fault_of_image
from coss_hf.data.encoded_files import EncodedFiles
from coss_hf.data.rows import image_rows, without_selection
from coss_hf.data.run_images import BAD, GOOD, NOT_CHECKED, CheckedSplit, RunImages
from coss_hf.utils.messages import first_names, get_logger

logger = get_logger(__name__)

MAX_LISTED = 20  # images that a message names
CONTENT = "image_hash"  # the column of hashes of the content
FILE = "image_file_hash"  # the column of hashes of name and size
SAMPLE = 16  # images that are decoded in any case: a dataset of nothing but damaged ones is found at once
PARALLEL_FROM = 2_000  # images: for fewer, starting processes takes longer than they save
MAX_PROCESSES = 8


class ImageCheck:
    """Identifies the images that a run uses, and finds those that cannot be decoded.

    Args:
        column: the name of the image column.
        on_bad_image: "error", or "skip" to leave out images that cannot be decoded.
        num_proc: number of processes; None for as many as there are processors, for many images.
        recorded: the images of the run that is to be resumed.
        by_content: read and decode every image, and identify it by its content. Else by name and size of its file;
            then only a sample is decoded, and what "skip" must leave out of an evaluation.
        sample: number of images in this sample, of each split.

    Attributes:
        bad_images: names of the images left out so far: their path, else their split and row.
        found: by split, what the check found.
    """

    def __init__(
        self,
        column: str,
        on_bad_image: str,
        num_proc: int | None,
        recorded: RunImages | None = None,
        *,
        by_content: bool = True,
        sample: int = SAMPLE,
    ):
        self.column = column
        self.on_bad_image = on_bad_image
        self.num_proc = num_proc
        self.recorded = recorded or RunImages()
        self.by_content = by_content
        self.sample = sample
        self.bad_images: list[str] = []
        self.found: dict[str, CheckedSplit] = {}

    def all(self, images: Dataset, split: str) -> Dataset:
        """Check all images of a split that are evaluated on; result as of `parts`."""
        rows = np.arange(len(images))
        return self.parts(images, split, [rows], evaluated=rows)[0]

    def parts(self, images: Dataset, split: str, parts: list[np.ndarray], evaluated: np.ndarray) -> list[Dataset]:
        """Check the images of all parts of a split.

        Args:
            images: the n rows of the split.
            split: the name of the split.
            parts: row numbers of each part.
            evaluated: row numbers of those that are evaluated on.

        Returns:
            The parts with the column `image_hash`, or `image_file_hash`, each in the dataset's order and without bad
            images.

        Raises:
            ValueError: an image cannot be decoded ("error"), none of a part is left ("skip"), or an image is no longer
                the one that the run began with.
        """
        images = image_rows(images, self.column)
        images = images.remove_columns([name for name in (CONTENT, FILE) if name in images.column_names])
        rows = np.sort(np.concatenate(parts))
        checked = _CheckedImages(images, split, self.column, self.num_proc)
        recorded = self.recorded.checked.get(split)
        if recorded is not None and (len(recorded.states) != len(images) or recorded.by_content != self.by_content):
            recorded = None
        if self.by_content:
            found = self._by_content(checked, rows)
        else:
            found = self._by_file(checked, rows, evaluated, recorded)
        if recorded is not None:
            self._compare(images, split, found, recorded, checked)
        self.found[split] = found
        bad = rows[found.states[rows] == BAD]
        if len(bad):
            names = self._names(images, split, bad)
            problem = checked.problems.get(int(bad[0]))
            looked_at = int((checked.states[rows] != NOT_CHECKED).sum())
            total = len(rows) if looked_at == len(rows) else f"a sample of {looked_at}"
            _report_bad_images(names, total, split, self.on_bad_image, problem)
            self.bad_images += names
        column = CONTENT if self.by_content else FILE
        images = without_selection(images).add_column(column, found.hashes, feature=Value("uint64"))
        return [self._good(images, split, part, found.states) for part in parts]

    def _by_content(self, checked: "_CheckedImages", rows: np.ndarray) -> CheckedSplit:
        checked.read(rows)
        found = CheckedSplit(np.zeros(len(checked.states), np.uint64), np.zeros(len(checked.states), np.uint8))
        found.hashes[rows] = checked.hashes[rows]
        found.states[rows] = checked.states[rows]
        return found

    def _by_file(
        self, checked: "_CheckedImages", rows: np.ndarray, evaluated: np.ndarray, recorded: CheckedSplit | None
    ) -> CheckedSplit:
        hashes = checked.files.fingerprints()
        looked_at = [rows[np.linspace(0, len(rows) - 1, min(self.sample, len(rows)), dtype=np.int64)]]
        if self.on_bad_image == "skip":
            looked_at.append(evaluated)  # an image in the place of another would be scored by the label of that one
        times = checked.files.times
        if recorded is not None:
            other = (recorded.hashes != hashes) | recorded.changed_since(times)
            looked_at.append(rows[(recorded.states[rows] == GOOD) & other[rows]])
        looked_at = np.unique(np.concatenate(looked_at))
        checked.read(looked_at)
        found = CheckedSplit(np.zeros(len(hashes), np.uint64), np.zeros(len(hashes), np.uint8), False, times)
        found.hashes[rows] = hashes[rows]
        found.states[rows] = GOOD
        found.states[rows[checked.files.sizes[rows] <= 0]] = BAD
        found.states[looked_at[checked.states[looked_at] == BAD]] = BAD
        return found

    def _good(self, images: Dataset, split: str, part: np.ndarray, states: np.ndarray) -> Dataset:
        good = np.sort(part[states[part] == GOOD])
        if len(part) and not len(good):
            raise ValueError(f"--on_bad_image skip: no image is left of the {len(part)} taken from split {split}.")
        return images if len(good) == len(images) else images.select(good)

    def _compare(
        self,
        images: Dataset,
        split: str,
        found: CheckedSplit,
        recorded: CheckedSplit,
        checked: "_CheckedImages",
    ) -> None:
        """Bring `found` to what was recorded when the run began, so that its rows stay the same."""
        was_good = (recorded.states == GOOD) & (found.states != NOT_CHECKED)
        other = found.hashes != recorded.hashes
        for row in np.flatnonzero(was_good & ~other & recorded.changed_since(found.times)).tolist():
            other[row] = self._has_other_content(found.hashes[row], checked.hashes[row])
        changed = np.flatnonzero(was_good & (found.states == GOOD) & other)
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

    def _has_other_content(self, file: np.uint64, content: np.uint64) -> bool:
        """Whether a file of this name and size is known to the run, and none of them with this content."""
        known = self.recorded.contents
        known = known[known[:, 0] == file, 1]
        return bool(len(known)) and content not in known

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


def content_hashes(images: Dataset, column: str) -> np.ndarray:
    """Hashes of the contents of n images, uint64 (n,), of which each file is read once; 0 where it cannot be decoded.

    Args:
        images: rows with encoded images.
        column: the name of their column.
    """
    checked = _CheckedImages(images, "train", column, None)
    checked.read(np.arange(len(images)))
    return np.where(checked.states == GOOD, checked.hashes, 0).astype(np.uint64)


class _CheckedImages:
    """Hashes of content, and what cannot be decoded, of the images of a split that were read by now.

    They are kept in the cache of `datasets`, row by row: an image is read again only when its file changed.

    Args:
        images: the n rows of the split, undecoded.
        split: the name of the split.
        column: the name of the image column.
        num_proc: number of processes.

    Attributes:
        files: names and sizes.
        hashes: uint64 (n,); 0 where an image was not read.
        states: uint8 (n,), NOT_CHECKED, GOOD or BAD.
        problems: why images are BAD, by row.
    """

    def __init__(self, images: Dataset, split: str, column: str, num_proc: int | None):
        self._images = images.select_columns(column)
        self._split = split
        self._column = column
        self._num_proc = num_proc
        self.files = EncodedFiles(self._images, column)
        self.hashes = np.zeros(len(images), np.uint64)
        self.states = np.zeros(len(images), np.uint8)
        self.problems: dict[int, str] = {}
        self._loaded = False

    def read(self, rows: np.ndarray) -> None:
        """Read and decode the images of the given rows that were not read before."""
        if not self._loaded:
            self._load()
        rows = rows[self.states[rows] == NOT_CHECKED]
        if not len(rows):
            return
        todo = self._images if len(rows) == len(self._images) else self._images.select(rows)
        checked = todo.map(
            _check_batch,
            input_columns=self._column,
            remove_columns=self._column,
            batched=True,
            batch_size=32,
            features=Features({CONTENT: Value("uint64"), "problem": Value("string")}),
            num_proc=self._processes(len(rows)),
            keep_in_memory=True,
            new_fingerprint="checked",  # found by this class again
            desc=f"Reading and checking images ({self._split})",
        ).with_format("arrow")[:]
        self.hashes[rows] = checked[CONTENT].to_numpy()
        for row, problem in zip(rows.tolist(), checked["problem"].to_pylist(), strict=True):
            self.states[row] = GOOD if problem is None else BAD
            if problem is not None:
                self.problems[row] = problem
        if len(rows) > SAMPLE:
            self._save()

    def _processes(self, count: int) -> int | None:
        if self._num_proc is not None or count < PARALLEL_FROM:
            return self._num_proc
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(MAX_PROCESSES, processors)

    def _file(self) -> Path:
        # Whether an image decodes depends on Pillow. The default place would be the user's own folder.
        key = repr(("checked images, version 2", self._images._fingerprint, PIL.__version__))
        name = blake2b(key.encode(), digest_size=16).hexdigest()
        return Path(datasets.config.HF_DATASETS_CACHE, "coss_hf", "checked", f"{name}.npz")

    def _load(self) -> None:
        self._loaded = True
        try:
            with np.load(self._file()) as kept:
                if len(kept["states"]) != len(self.states):
                    return
                same = (kept["sizes"] == self.files.sizes) & (kept["times"] == self.files.times)
                self.hashes = np.where(same, kept["hashes"], 0).astype(np.uint64)
                self.states = np.where(same, kept["states"], NOT_CHECKED).astype(np.uint8)
                problems = json.loads(str(kept["problems"]))
        except Exception as error:  # none, or a damaged one; each reader has errors of its own
            logger.debug("no images were checked before: %s", error)
            return
        self.problems = {int(row): text for row, text in problems.items() if same[int(row)]}

    def _save(self) -> None:
        file = self._file()
        arrays = {"hashes": self.hashes, "states": self.states, "sizes": self.files.sizes, "times": self.files.times}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=".writing-") as temporary:
                unfinished = Path(temporary, file.name)
                np.savez(unfinished, problems=json.dumps(self.problems), **arrays)
                os.replace(unfinished, file)
        except OSError as error:
            logger.warning(
                "Which images were checked is not kept in %s (%s): they are read again each time. Free some space or "
                "get the permission, or set HF_DATASETS_CACHE to another folder.",
                file,
                error,
            )


def _report_bad_images(names: list[str], total: int | str, split: str, on_bad_image: str, problem: str | None) -> None:
    found = f"{len(names)} of {total} images of split {split} cannot be decoded: {first_names(names, MAX_LISTED)}"
    if on_bad_image == "error":
        raise ValueError(
            f"--on_bad_image error: {found}. The first: {problem or 'it is left out, since the run began without it'}. "
            f"Repair them, or use --on_bad_image skip."
        )
    logger.warning("Skipping images: %s", found)


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
            if not is_fault_of_image(error):
                raise
            problem = str(error)
        hashes.append(content_hash(data))
        problems.append(problem)
    return {"image_hash": np.array(hashes, np.uint64), "problem": problems}
