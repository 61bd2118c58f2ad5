"""The images that a run began with: kept next to its checkpoints, so that it resumes when files were deleted since."""

import json
import logging
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import Dataset

from coss_hf.data.image_folder import as_dataset, paths_of_images
from coss_hf.utils.messages import first_names

logger = logging.getLogger(__name__)

FOLDER = "_images"  # in the run's folder; names of this kind are not pushed
NOT_CHECKED = 0
GOOD = 1
BAD = 2


@dataclass
class CheckedSplit:
    """What the check of a split found.

    Attributes:
        hashes: content hashes of the n images, uint64; 0 where an image was not checked.
        states: NOT_CHECKED, GOOD or BAD for each of the n images, uint8.
    """

    hashes: np.ndarray
    states: np.ndarray


@dataclass
class RunImages:
    """The images of a run.

    Attributes:
        root: the path of the folder of images; None for images that come from elsewhere.
        listed: the rows of that folder by split; empty for images that come from elsewhere.
        checked: what the check of each split found.
    """

    root: str | None = None
    listed: dict[str, Dataset] = field(default_factory=dict)
    checked: dict[str, CheckedSplit] = field(default_factory=dict)

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
            np.savez(unfinished / f"checked-{number}.npz", hashes=split.hashes, states=split.states)
        os.replace(unfinished, folder)

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
                    checked[split] = CheckedSplit(arrays["hashes"], arrays["states"])
        except Exception as error:  # each reader has errors of its own for a damaged file
            raise ValueError(
                f"--resume_from_checkpoint: {folder} is damaged ({error}); remove it if no image was changed since the "
                f"run began."
            ) from error
        return cls(about["root"], listed, checked)
