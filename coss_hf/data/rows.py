"""Rows of undecoded images."""

from pathlib import Path

import datasets
from datasets import Dataset


def image_rows(dataset: Dataset, column: str) -> Dataset:
    """The dataset with plain rows and undecoded images."""
    return dataset.with_format(None).cast_column(column, datasets.Image(decode=False))


def without_selection(dataset: Dataset, folder: Path | None = None) -> Dataset:
    """The dataset with a table of its own rows, which a column can be joined to, where it selects those of another one.

    Joining would write that table, too: with the bytes of all images, into the user's own folder.

    Args:
        dataset: any rows.
        folder: where the table is written; by default in the cache of `datasets`. It stays in memory where all rows
            are there.
    """
    if dataset._indices is None:
        return dataset
    folder = folder or Path(datasets.config.HF_DATASETS_CACHE, "coss_hf", "selected")
    file = str(folder / f"{dataset._fingerprint}.arrow") if dataset.cache_files else None
    return dataset.flatten_indices(cache_file_name=file)
