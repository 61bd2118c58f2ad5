"""Un-augmented images, processed for a network."""

from collections.abc import Callable

from datasets import Dataset

from coss_hf.data.reading import ImageReader


class ProcessedImages:
    """Un-augmented images for a `DataLoader`: item i is `preprocess([image i])[0]`, a tensor (3, h, w).

    Args:
        dataset: n rows as `load_images` returns them.
        image_column: the name of their image column.
        preprocess: a function from a list of n RGB images to a tensor (n, 3, h, w), such as `Backbone.preprocess`.
        on_bad_image: what to do where an image can no longer be decoded, see `ImageReader`.
    """

    def __init__(self, dataset: Dataset, image_column: str, preprocess: Callable, on_bad_image: str = "error"):
        self.reader = ImageReader(dataset, image_column, on_bad_image)
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.reader)

    def names(self, indices: list[int]) -> list[str]:
        """Names of images for messages: their path, else their row."""
        return self.reader.names(indices)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list:
        return list(self.preprocess(list(self.reader.read(list(indices)))))
