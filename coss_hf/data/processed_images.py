"""Un-augmented images, processed for a network."""

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
        dataset: rows as `load_images` returns them.
        image_column: their images.
        preprocess: list of n RGB images -> (n, 3, h, w), such as `Backbone.preprocess`.
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
        return list(self.preprocess([decode(record) for record in self.rows[list(indices)][self.image_column]]))
