"""Rows of undecoded images."""

import datasets
from datasets import Dataset


def image_rows(dataset: Dataset, column: str) -> Dataset:
    """The dataset with plain rows and undecoded images."""
    return dataset.with_format(None).cast_column(column, datasets.Image(decode=False))
