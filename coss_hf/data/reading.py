"""Reading of images while a run is at work: what happens to one that can no longer be decoded."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from coss_hf.data.decoding import Decoded, content_hash, decode, decode_reduced, encoded_bytes
from coss_hf.data.rows import image_rows
from coss_hf.utils.errors import UnreadableImage
from coss_hf.utils.messages import get_logger

logger = get_logger(__name__)

ATTEMPTS = 100  # images that are tried in the place of another


class ImageReader:
    """Decoded images of a dataset.

    An image that can no longer be decoded ("skip") is replaced by another one of the dataset, which depends on its row
    alone: it is the same in every worker, process and resumed run.

    Args:
        dataset: n rows as `load_images` returns them.
        column: the name of their image column.
        on_bad_image: "error" or "skip".
    """

    def __init__(self, dataset: Dataset, column: str, on_bad_image: str = "error"):
        self.rows = image_rows(dataset.select_columns(column), column)
        self.column = column
        self.on_bad_image = on_bad_image
        self._replaced = torch.zeros(len(self.rows), dtype=torch.bool)
        self._contents: torch.Tensor | None = None
        self._expected: np.ndarray | None = None
        self._changed = torch.zeros(len(self.rows), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: list[int]) -> Iterator[Image.Image]:
        """Decode the images of the given rows, one at a time.

        Raises:
            UnreadableImage: one cannot be decoded ("error"), or very many cannot ("skip").
        """
        records = self.rows[indices][self.column]
        return map(self._decode, indices, records)

    def files(self, indices: list[int]) -> Iterator[Callable[[Callable | None], Decoded]]:
        """The same images, each as a function that decodes it: see `decode_reduced` for its argument.

        Raises:
            UnreadableImage: as of `read`, when the function is called.
        """
        records = self.rows[indices][self.column]
        for index, record in zip(indices, records, strict=True):
            yield partial(self._decode_reduced, index, record)

    def names(self, indices: list[int]) -> list[str]:
        """Names of images for messages: their path, else their row."""
        records = self.rows[indices][self.column]
        return [(record or {}).get("path") or f"row {index}" for index, record in zip(indices, records, strict=True)]

    def share_memory(self) -> None:
        """Let this process know what loader workers will have replaced."""
        self._replaced.share_memory_()
        self._changed.share_memory_()
        if self._contents is not None:
            self._contents.share_memory_()

    def keep_contents(self) -> None:
        """Keep a hash of the content of each image from now on, of this process and its loader workers."""
        self._contents = torch.zeros(len(self.rows), dtype=torch.int64)
        self.share_memory()

    def expect_contents(self, hashes: np.ndarray) -> None:
        """From now on compare the content of each image, when it is read, with its hash, uint64 (n,)."""
        self._expected = hashes

    def contents(self) -> np.ndarray:
        """Hashes of the content of each image, uint64; 0 where it was not read."""
        return self._contents.numpy().view(np.uint64)

    def replaced(self) -> list[int]:
        """The rows that this process and its workers have replaced so far."""
        return self._replaced.nonzero().flatten().tolist()

    def is_other_image(self, indices: list[int]) -> list[bool]:
        """For each of the rows, whether this process or its workers met another image than was expected.

        It could not be decoded and another one took its place, or its file has another content by now.
        """
        return (self._replaced | self._changed)[indices].tolist()

    def replaced_names(self) -> list[str]:
        """The names of the images that were replaced so far."""
        return self.names(self.replaced())

    def add_replaced(self, rows: list[int]) -> None:
        """Note rows that other processes have replaced."""
        self._replaced[rows] = True

    def _decode(self, index: int, record: dict) -> Image.Image:
        return self._decode_reduced(index, record, None).image

    def _decode_reduced(self, index: int, record: dict, reduction: Callable | None) -> Decoded:
        try:
            if self._contents is not None or self._expected is not None:
                record = self._with_content_known(index, record)
            return decode_reduced(record, reduction)
        except ValueError as error:
            if self.on_bad_image != "skip":
                raise UnreadableImage(
                    f"--on_bad_image error: {error}. Restore the file, or give --on_bad_image skip, which takes other "
                    f"images in its place; with --resume_from_checkpoint where a checkpoint was written."
                ) from error
            return self._replace(index, error, reduction)[1]

    def rows_to_read(self) -> list[int]:
        """Decode all ``n`` images, and give for each its row, or the row of the one that "skip" puts in its place.

        Raises:
            UnreadableImage: very many cannot be decoded.
        """
        rows = []
        for row in range(len(self)):
            try:
                decode(self.rows[row][self.column])
            except ValueError as error:
                rows.append(self._replace(row, error, None)[0])
            else:
                rows.append(row)
        return rows

    def _with_content_known(self, index: int, record: dict | None) -> dict | None:
        try:
            data = encoded_bytes(record)
        except (OSError, ValueError):  # met again by `decode`, which says more
            return record
        found = content_hash(data)
        if self._contents is not None:
            self._contents.numpy().view(np.uint64)[index] = found
        if self._expected is not None and found != int(self._expected[index]):
            # 0 is the hash of those that could not be decoded: they are replaced, and named so.
            said = any(int(self._expected[row]) for row in self._changed.nonzero().flatten().tolist())
            if int(self._expected[index]) and not said:
                logger.warning(
                    "%s was changed after its content was identified: the teacher's embedding of its views is neither "
                    "read from --teacher_cache nor kept there.",
                    record["path"] or f"row {index}",
                )
            self._changed[index] = True
        return {"bytes": data, "path": record["path"]}

    def _replace(self, index: int, error: ValueError, reduction: Callable | None) -> tuple[int, Decoded]:
        candidates = np.random.default_rng(index).integers(0, len(self.rows), ATTEMPTS)
        for candidate in candidates.tolist():
            try:
                found = decode_reduced(self.rows[candidate][self.column], reduction)
            except ValueError:
                continue
            if not self._replaced[index]:
                self._replaced[index] = True
                count = int(self._replaced.sum())
                name = self.names([candidate])[0]
                logger.warning("--on_bad_image skip: %s; %s takes its place (%d so far).", error, name, count)
            return candidate, found
        raise UnreadableImage(
            f"--on_bad_image skip: {error}, and {ATTEMPTS} other images neither. Make the images available and give "
            f"the same command with --resume_from_checkpoint."
        ) from error
