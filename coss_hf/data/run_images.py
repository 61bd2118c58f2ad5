"""The images that a run began with: kept next to its checkpoints, so that it resumes when files were deleted since."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from coss_hf.data.image_folder import as_dataset, paths_of_images
from coss_hf.utils.messages import first_names, get_logger

logger = get_logger(__name__)

FOLDER = "_images"  # in the run's folder; names of this kind are not pushed
CONTENTS = "images-read-{}.npy"  # of a checkpoint, by process
NOT_CHECKED = 0
GOOD = 1
BAD = 2


@dataclass
class CheckedSplit:
    """What the check of a split found.

    Attributes:
        hashes: hashes of the n images, uint64; 0 where an image was not checked.
        states: NOT_CHECKED, GOOD or BAD for each of the n images, uint8.
        by_content: whether the hashes are of the contents, or of names and sizes of files.
        times: when each file was changed, in nanoseconds, where the hashes are of names and sizes; 0 without a file.
    """

    hashes: np.ndarray
    states: np.ndarray
    by_content: bool = True
    times: np.ndarray | None = None

    def changed_since(self, times: np.ndarray | None) -> np.ndarray:
        """Which of n files have another time than `times`; none where all have: then the folder was copied."""
        changed = np.zeros(len(self.states), bool)
        if self.times is None or times is None:
            return changed
        changed = (self.times != times) & (self.times != 0) & (times != 0)
        return np.zeros_like(changed) if changed.all() else changed


@dataclass
class RunImages:
    """The images of a run.

    Attributes:
        root: the path of the folder of images; None for images that come from elsewhere.
        listed: the rows of that folder by split; empty for images that come from elsewhere.
        checked: what the check of each split found.
        contents: hashes of files and of their contents, uint64 (r, 2), as they were read.
    """

    root: str | None = None
    listed: dict[str, Dataset] = field(default_factory=dict)
    checked: dict[str, CheckedSplit] = field(default_factory=dict)
    contents: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))

    @property
    def by_content(self) -> bool:
        """Whether the run read every image before it began, and so must a resumed one."""
        return any(split.by_content for split in self.checked.values())

    def splits_then(self, now: dict[str, Dataset]) -> dict[str, Dataset]:
        """The splits of the folder as the run began with them, whatever lies there `now`; new images are logged."""
        known = {path for rows in self.listed.values() for path in paths_of_images(rows)}
        new = [path for rows in now.values() for path in paths_of_images(rows) if path not in known]
        if new:
            logger.warning(
                "--resume_from_checkpoint: %d images came into %s after the run began and are left out: %s.",
                *(len(new), self.root, first_names(new)),
            )
        return self.listed

    def same_as(self, other: "RunImages") -> bool:
        """Whether both name the same images, with the same content."""
        paths = [{split: list(paths_of_images(rows)) for split, rows in one.listed.items()} for one in (self, other)]
        return (
            paths[0] == paths[1]
            and self.checked.keys() == other.checked.keys()
            and all(
                np.array_equal(split.hashes, other.checked[name].hashes)
                and np.array_equal(split.states, other.checked[name].states)
                for name, split in self.checked.items()
            )
        )

    def same_places(self, other: "RunImages") -> bool:
        """Whether both name the same paths in their folder and as many images by split; contents are not compared.

        Only then is a random part of a split the same images.
        """
        places = [
            {
                split: [path.removeprefix(one.root or "") for path in paths_of_images(rows)]
                for split, rows in one.listed.items()
            }
            for one in (self, other)
        ]
        sizes = [{split: len(found.states) for split, found in one.checked.items()} for one in (self, other)]
        return places[0] == places[1] and sizes[0] == sizes[1]

    def save(self, output_dir: str | Path, replace: bool = True) -> None:
        """Write into the folder of a run; what is there already stays without `replace`."""
        folder = Path(output_dir, FOLDER)
        if folder.exists() and not replace:
            return
        unfinished = folder.with_name(f"{FOLDER}.unfinished")
        for old in (unfinished, folder):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.mkdir(parents=True)
        about = {"root": self.root, "listed": list(self.listed), "checked": list(self.checked)}
        (unfinished / "about.json").write_text(json.dumps(about))
        for number, rows in enumerate(self.listed.values()):
            pq.write_table(rows.data.table, unfinished / f"listed-{number}.parquet")
        for number, split in enumerate(self.checked.values()):
            arrays = {"hashes": split.hashes, "states": split.states}
            if not split.by_content:
                arrays["times"] = split.times
            np.savez(unfinished / f"checked-{number}.npz", **arrays)
        os.replace(unfinished, folder)

    def save_contents(self, checkpoint: str | Path, contents: np.ndarray, process: int) -> None:
        """Write what a process has read so far into a checkpoint; what was read before a resume stays."""
        np.save(
            Path(checkpoint, CONTENTS.format(process)), np.unique(np.concatenate([self.contents, contents]), axis=0)
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path | None) -> "RunImages | None":
        """The images of the run that wrote a checkpoint; None without a checkpoint, and of an old one.

        Raises:
            ValueError: the files are damaged.
        """
        found = None if checkpoint is None else cls.load(Path(checkpoint).parent)
        if found is not None:
            files = sorted(Path(checkpoint).glob(CONTENTS.format("*")))
            found.contents = np.concatenate([found.contents, *map(np.load, files)])
        return found

    @classmethod
    def load(cls, output_dir: str | Path) -> "RunImages | None":
        """Read what `save` wrote; None where it did not.

        Raises:
            ValueError: the files are damaged.
        """
        folder = Path(output_dir, FOLDER)
        if not folder.exists():
            return None
        try:
            about = json.loads((folder / "about.json").read_text())
            listed = {
                split: as_dataset(pq.read_table(folder / f"listed-{number}.parquet"))
                for number, split in enumerate(about["listed"])
            }
            checked = {}
            for number, split in enumerate(about["checked"]):
                with np.load(folder / f"checked-{number}.npz") as arrays:
                    times = arrays.get("times")
                    checked[split] = CheckedSplit(arrays["hashes"], arrays["states"], times is None, times)
        except Exception as error:  # each reader has errors of its own for a damaged file
            raise ValueError(
                f"--resume_from_checkpoint: {folder} is damaged ({error}); remove it if no image was changed since the "
                f"run began."
            ) from error
        return cls(about["root"], listed, checked)
