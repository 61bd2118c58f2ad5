"""Un-augmented images, processed for a network, and rows of undecoded images."""

from collections.abc import Callable

import datasets
from datasets import Dataset

from coss_hf.data.decoding import decode


def image_rows(dataset: Dataset, column: str) -> Dataset:
    """The dataset with plain rows and undecoded images."""
    return dataset.with_format(None).cast_column(column, datasets.Image(decode=False))


class ProcessedImages:
    """Un-augmented images for a `DataLoader`: item i is `preprocess([image i])[0]`, a tensor (3, h, w).

    Args:
        dataset: n rows as `load_images` returns them.
        image_column: the name of their image column.
        preprocess: a function from a list of n RGB images to a tensor (n, 3, h, w), such as `Backbone.preprocess`.
    """

    def __init__(self, dataset: Dataset, image_column: str, preprocess: Callable):
        self.rows = image_rows(dataset.select_columns(image_column), image_column)
        self.image_column = image_column
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list:
        records = self.rows[list(indices)][self.image_column]
        return list(self.preprocess([decode(record) for record in records]))
