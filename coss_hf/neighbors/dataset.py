"""A dataset of all splits that carries each training image's neighbours."""

from pathlib import Path

import datasets
import numpy as np

from coss_hf.data.loading import ImageSplits
from coss_hf.data.rows import without_selection
from coss_hf.neighbors.columns import NEIGHBORS, NEIGHBORS_HASH, with_columns


def splits_with_neighbors(splits: ImageSplits, neighbors: np.ndarray, cache_dir: Path) -> datasets.DatasetDict:
    """Return one dataset of all splits, with two columns more.

    The Hub wants the same columns in each split: they are null where there are no neighbours.

    Args:
        splits: the images.
        neighbors: ``(n, K)`` rows of each training image's neighbours.
        cache_dir: folder for files of the new columns.
    """
    train = with_columns(splits.train, neighbors, cache_dir)
    result = {"train": train}
    for name, split in (("validation", splits.validation), ("test", splits.test)):
        if split is None:
            continue
        split = without_selection(split, cache_dir)
        for column in (NEIGHBORS, NEIGHBORS_HASH):
            if column in split.column_names:
                split = split.remove_columns(column)
            split = split.add_column(column, [None] * len(split), feature=train.features[column])
        result[name] = split
    return datasets.DatasetDict(result).cast_column(splits.image_column, datasets.Image())
